function openTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target && target.tagName === "DETAILS") {
    target.open = true;
    target.querySelector("summary").focus({ preventScroll: true });
    target.scrollIntoView();
  }
}
addEventListener("hashchange", openTarget);
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((item) => { item.open = true; }));
openTarget();

function explore(data) {
  const byId = (id) => document.getElementById(id);
  const element = (name, text) => Object.assign(document.createElement(name), { textContent: text });
  const { keys, links, marks, columns } = data;
  const count = keys.length, NONE = -1;
  const COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#5D3A9B", "#000000"];
  const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [53, 183, 121], [170, 200, 40]]; // dark to light, never pale
  const MARK_NAMES = ["knee", "front", ""];

  const valueText = (column, i) => {
    const value = column.values[i];
    if (value === null) return "–";
    if (column.levels) return column.levels[value];
    return column.fixed ? value.toFixed(column.digits) : String(Number(value.toPrecision(column.digits)));
  };
  const numeric = columns.filter((column) => !column.levels);
  const named = columns.filter((column) => !column.measured);
  const configuration = (i) => named.map((column) => `${column.head} ${valueText(column, i)}`).join(", ");

  // What is shown: rows that pass every filter, in the order of the table.
  let shown = keys.map((_, i) => i), sortedBy = null, rising = true, page = 0, picked = NONE, hovered = NONE;
  const wanted = new Map();

  function applyFilters() {
    shown = keys.map((_, i) => i).filter((i) => [...wanted].every(([column, text]) => valueText(column, i) === text));
    sortRows();
    page = 0;
    drawAll();
  }
  function sortRows() {
    if (!sortedBy) return;
    const { values, levels } = sortedBy, sign = rising ? 1 : -1;
    const rank = levels && new Map(levels.map((text, k) => [k, text]));
    shown.sort((a, b) => {
      const x = values[a], y = values[b];
      if (x === null || y === null) return (x === null) - (y === null); // empty cells come last either way
      return sign * (levels ? compareTexts(rank.get(x), rank.get(y)) : x - y) || a - b;
    });
  }

  // Table ------------------------------------------------------------------------------------------------
  const table = byId("table"), heads = [...table.tHead.rows[0].cells];
  heads.slice(1).forEach((head, k) => head.querySelector("button").addEventListener("click", () => {
    rising = nextOrder(heads, head);
    sortedBy = columns[k];
    sortRows();
    page = 0;
    drawTable();
  }));
  function drawTable() {
    const first = page * PAGE_ROWS, rows = shown.slice(first, first + PAGE_ROWS);
    table.tBodies[0].replaceChildren(...rows.map((i) => {
      const row = document.createElement("tr");
      row.className = MARK_NAMES[marks[i]] + (i === picked ? " chosen" : "");
      row.append(element("td", ""), ...columns.map((column) => element("td", valueText(column, i))));
      row.cells[0].append(pointLink(i));
      row.addEventListener("click", () => pick(i));
      return row;
    }));
    const number = (n) => n.toLocaleString("en");
    byId("range").textContent = `${number(rows.length && first + 1)} to ${number(first + rows.length)} of ${number(shown.length)} points`
      + (shown.length < count ? ` (of ${number(count)} in all)` : "");
    byId("before").disabled = page === 0;
    byId("after").disabled = first + PAGE_ROWS >= shown.length;
  }
  function pointLink(i) {
    if (!links[i]) return element("span", keys[i]);
    return Object.assign(element("a", keys[i]), { href: links[i] });
  }
  for (const [id, step] of [["before", -1], ["after", 1]]) byId(id).addEventListener("click", () => { page += step; drawTable(); });

  // Choices ----------------------------------------------------------------------------------------------
  const options = (select, list, chosen) => {
    list.forEach((column) => select.append(Object.assign(element("option", column.head), { value: column.name })));
    if (list.some((column) => column.name === chosen)) select.value = chosen;
    select.addEventListener("change", drawPlot);
  };
  const hasAccuracy = numeric.some((column) => column.name === "accuracy_integer");
  options(byId("x"), numeric, "latency_ms");
  options(byId("y"), numeric, hasAccuracy ? "accuracy_integer" : "energy_pj");
  options(byId("colour"), columns, columns.some((column) => column.name === "block") ? "block" : named[0] && named[0].name);
  for (const id of ["logx", "logy"]) byId(id).addEventListener("change", drawPlot);
  columns.filter((column) => column.filter).forEach((column) => {
    const texts = [...new Set(keys.map((_, i) => valueText(column, i)))].sort(compareTexts);
    if (texts.length < 2) return;
    const label = element("label", `${column.head} `), select = document.createElement("select");
    select.append(element("option", "all"), ...texts.map((text) => element("option", text)));
    select.addEventListener("change", () => {
      if (select.selectedIndex) wanted.set(column, select.value); else wanted.delete(column);
      applyFilters();
    });
    select.setAttribute("aria-label", `show ${column.head}`);
    label.append(select);
    byId("filters").append(label);
  });

  // Plot -------------------------------------------------------------------------------------------------
  const canvas = byId("plot"), tip = byId("tip"), brush = canvas.getContext("2d");
  const MARGIN = { left: 70, right: 16, top: 14, bottom: 46 };
  let places = [], boost = 1; // places: [x, y, row] in CSS pixels

  const chosen = (id) => columns.find((column) => column.name === byId(id).value);
  function ticks(low, high, log) {
    if (log) {
      const list = [];
      for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) for (const m of [1, 2, 5]) list.push(m * 10 ** e);
      const inside = list.filter((t) => t >= low && t <= high);
      if (inside.length > 1) return inside;
    }
    const rough = (high - low) / 6, unit = 10 ** Math.floor(Math.log10(rough));
    const step = unit * ([1, 2, 5].find((m) => m * unit >= rough) || 10), list = [];
    for (let k = Math.ceil(low / step); k * step <= high; k++) list.push(k * step);
    return list;
  }
  function axis(column, log, from, to) {
    const values = shown.map((i) => column.values[i]).filter((v) => v !== null && (!log || v > 0));
    let low = Infinity, high = -Infinity;
    for (const v of values) { low = Math.min(low, v); high = Math.max(high, v); }
    if (low > high) [low, high] = [0, 1];
    const f = log ? Math.log10 : (v) => v, back = log ? (v) => 10 ** v : (v) => v;
    const pad = 0.05 * (f(high) - f(low)) || 0.5 * Math.abs(f(low)) || 0.5;
    const [a, b] = [f(low) - pad, f(high) + pad];
    return { ticks: ticks(back(a), back(b), log), place: (v) => (v === null || (log && v <= 0) ? null : from + (to - from) * (f(v) - a) / (b - a)) };
  }
  function palette(column) {
    if (column.levels || (!column.measured && new Set(column.values).size <= COLOURS.length)) {
      const texts = [...new Set(keys.map((_, i) => valueText(column, i)))].sort(compareTexts);
      const order = new Map(texts.map((text, k) => [text, k]));
      const look = (k) => ({ colour: COLOURS[k % COLOURS.length], shape: k % 4 });
      return { look: (i) => look(order.get(valueText(column, i))), legend: texts.slice(0, 24).map((text, k) => [text, look(k)]) };
    }
    const values = column.values.filter((v) => v !== null);
    let low = Infinity, high = -Infinity;
    for (const v of values) { low = Math.min(low, v); high = Math.max(high, v); }
    const at = (v) => {
      const t = (high > low ? (v - low) / (high - low) : 0) * (RAMP.length - 1), k = Math.min(Math.floor(t), RAMP.length - 2);
      return `rgb(${RAMP[k].map((c, j) => Math.round(c + (t - k) * (RAMP[k + 1][j] - c))).join(",")})`;
    };
    const look = (v) => ({ colour: v === null ? "#8C8C8C" : at(v), shape: 0 });
    const steps = [0, .25, .5, .75, 1].map((t) => low + t * (high - low));
    return { look: (i) => look(column.values[i]), legend: steps.map((v) => [String(Number(v.toPrecision(3))), look(v)]) };
  }
  const OUTLINES = [
    (r) => { const p = new Path2D(); p.arc(0, 0, r, 0, 7); return p; },
    (r) => { const p = new Path2D(); p.rect(-.9 * r, -.9 * r, 1.8 * r, 1.8 * r); return p; },
    (r) => new Path2D(`M0 ${-1.2 * r}L${1.1 * r} ${.9 * r}L${-1.1 * r} ${.9 * r}Z`),
    (r) => new Path2D(`M0 ${-1.3 * r}L${1.3 * r} 0L0 ${1.3 * r}L${-1.3 * r} 0Z`),
  ];
  const SHAPE_SVG = ['<circle r="4"/>', '<rect x="-3.6" y="-3.6" width="7.2" height="7.2"/>', '<path d="M0-4.8L4.4 3.6H-4.4Z"/>', '<path d="M0-5.2L5.2 0 0 5.2-5.2 0Z"/>'];
  function drawLegend(legend) {
    byId("legend").replaceChildren(...legend.map(([text, { colour, shape }]) => {
      const item = element("li", text);
      item.insertAdjacentHTML("afterbegin", `<svg width="12" height="12" viewBox="-6 -6 12 12" fill="${colour}" aria-hidden="true">${SHAPE_SVG[shape]}</svg>`);
      return item;
    }));
  }
  function drawPlot() {
    const [xc, yc, cc] = [chosen("x"), chosen("y"), chosen("colour")];
    const width = canvas.clientWidth, height = canvas.clientHeight, ratio = boost * (window.devicePixelRatio || 1);
    if (!width) return;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    brush.setTransform(ratio, 0, 0, ratio, 0, 0);
    brush.clearRect(0, 0, width, height);
    brush.font = "12px system-ui, sans-serif";
    const right = width - MARGIN.right, bottom = height - MARGIN.bottom;
    const across = axis(xc, byId("logx").checked, MARGIN.left, right), up = axis(yc, byId("logy").checked, bottom, MARGIN.top);
    const tickText = (t) => String(Number(t.toPrecision(6)));
    brush.fillStyle = "#1a1a1a";
    brush.strokeStyle = "#e3e3e3";
    brush.textAlign = "center";
    for (const t of across.ticks) {
      const x = across.place(t);
      brush.beginPath(); brush.moveTo(x, MARGIN.top); brush.lineTo(x, bottom); brush.stroke();
      brush.fillText(tickText(t), x, bottom + 16);
    }
    brush.fillText(xc.head, (MARGIN.left + right) / 2, height - 10);
    brush.textAlign = "right";
    for (const t of up.ticks) {
      const y = up.place(t);
      brush.beginPath(); brush.moveTo(MARGIN.left, y); brush.lineTo(right, y); brush.stroke();
      brush.fillText(tickText(t), MARGIN.left - 6, y + 4);
    }
    brush.save();
    brush.translate(14, (MARGIN.top + bottom) / 2);
    brush.rotate(-Math.PI / 2);
    brush.textAlign = "center";
    brush.fillText(yc.head, 0, 0);
    brush.restore();
    brush.strokeStyle = "#1a1a1a";
    brush.strokeRect(MARGIN.left, MARGIN.top, right - MARGIN.left, bottom - MARGIN.top);

    const { look, legend } = palette(cc);
    const radius = shown.length > 2000 ? 2.5 : 4;
    const small = OUTLINES.map((outline) => outline(radius)), large = OUTLINES.map((outline) => outline(radius + 2));
    places = [];
    const dot = (x, y, i, outlined) => {
      const { colour, shape } = look(i), outline = (outlined ? large : small)[shape];
      brush.translate(x, y);
      brush.fillStyle = colour;
      brush.fill(outline);
      if (outlined) { brush.lineWidth = marks[i] === 0 ? 3 : 1.5; brush.strokeStyle = "#000"; brush.stroke(outline); brush.lineWidth = 1; }
      brush.translate(-x, -y);
    };
    for (const i of shown) {
      const x = across.place(xc.values[i]), y = up.place(yc.values[i]);
      if (x !== null && y !== null) places.push([x, y, i]);
    }
    for (const [x, y, i] of places) if (marks[i] === 2) dot(x, y, i, false);
    for (const [x, y, i] of places) if (marks[i] !== 2) dot(x, y, i, true);
    for (const [x, y, i] of places) if (i === picked || i === hovered) {
      brush.beginPath(); brush.arc(x, y, radius + 6, 0, 7); brush.lineWidth = 2; brush.strokeStyle = "#000"; brush.stroke(); brush.lineWidth = 1;
    }
    drawLegend(legend);
    canvas.setAttribute("aria-label", `${yc.head} against ${xc.head}, ${places.length} points`);
  }
  const nearest = (event) => {
    const box = canvas.getBoundingClientRect(), px = event.clientX - box.left, py = event.clientY - box.top;
    let best = NONE, least = 144; // within twelve pixels
    for (const [x, y, i] of places) { const d = (x - px) ** 2 + (y - py) ** 2; if (d < least) { least = d; best = i; } }
    return best;
  };
  function showTip(i) {
    tip.hidden = i === NONE;
    if (i === NONE) return;
    const [x, y] = places.find((place) => place[2] === i);
    const values = [chosen("x"), chosen("y")].map((column) => `${column.head}: ${valueText(column, i)}`);
    tip.replaceChildren(element("b", configuration(i)), ...values.map((text) => element("div", text)));
    const left = x > canvas.clientWidth / 2;
    tip.style.left = left ? "" : `${x + 14}px`;
    tip.style.right = left ? `${canvas.clientWidth - x + 14}px` : "";
    tip.style.top = `${Math.min(y, canvas.clientHeight - tip.offsetHeight - 4)}px`;
  }
  function hover(i) {
    if (i === hovered) return;
    hovered = i;
    canvas.style.cursor = i === NONE ? "" : "pointer";
    drawPlot();
    showTip(i);
  }
  function pick(i) {
    picked = i;
    const panel = byId("picked");
    panel.replaceChildren();
    if (i !== NONE) {
      panel.append(element("b", configuration(i)), `: ${columns.filter((c) => c.measured).map((c) => `${c.head} ${valueText(c, i)}`).join("; ")}. `);
      if (links[i]) panel.append(Object.assign(element("a", "Layer by layer"), { href: links[i], id: "layers" }));
      else panel.append("Its layers are in the result store: ", element("code", `hwsim explain RESULTS@${keys[i]}`));
    }
    drawPlot();
    table.querySelectorAll("tr.chosen").forEach((row) => row.classList.remove("chosen"));
    const row = table.tBodies[0].rows[shown.indexOf(i) - page * PAGE_ROWS];
    if (row) row.classList.add("chosen");
  }
  canvas.addEventListener("mousemove", (event) => hover(nearest(event)));
  canvas.addEventListener("mouseleave", () => hover(NONE));
  canvas.addEventListener("click", (event) => pick(nearest(event)));
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (step && places.length) {
      event.preventDefault();
      const order = [...places].sort((a, b) => a[0] - b[0]), at = order.findIndex((place) => place[2] === picked);
      pick(order[at < 0 ? 0 : Math.min(Math.max(at + step, 0), order.length - 1)][2]);
      showTip(picked);
    } else if (event.key === "Enter" && picked !== NONE && links[picked]) location.href = links[picked];
    else if (event.key === "Escape") { pick(NONE); showTip(NONE); }
  });
  addEventListener("resize", drawPlot);
  addEventListener("beforeprint", () => { boost = 3; drawPlot(); });
  addEventListener("afterprint", () => { boost = 1; drawPlot(); });
  function drawAll() { drawTable(); drawPlot(); }
  drawAll();
}
const data = JSON.parse(document.getElementById("data").textContent);
if (data.keys) explore(data);
