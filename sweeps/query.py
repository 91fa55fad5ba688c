"""SQL over the tables of a result store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hwsim.errors import InputError, Problem
from sweeps.store import TABLES, ResultStore

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["run_query"]


def run_query(store: ResultStore, sql: str) -> pd.DataFrame:
    """The rows that a query returns.

    Parameters
    ----------
    store : ResultStore
    sql : str
        One or more statements in DuckDB's SQL; the tables are ``points``, ``layers``, ``energy`` and ``storage``. The rows of
        the last one are returned.

    Raises
    ------
    InputError
        `duckdb` is not installed, or the query is wrong (with what DuckDB says of it).
    FormatError
        A file of the store is damaged.
    """
    try:
        import duckdb
    except ImportError:
        problem = Problem("query", "the package duckdb is not installed", 'pip install "hwsim[query]"')
        raise InputError(str(store.path), problem) from None
    with duckdb.connect(":memory:") as connection:
        for table in TABLES:
            if table in sql.lower():  # the others are not read
                connection.register(table, store.to_arrow(table))
        # From here on the query reaches nothing but these tables: no file is read or written.
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        try:
            result = connection.execute(sql)
            if result.description is None:
                raise InputError("query", Problem("", "returns no rows", "a SELECT does"))
            return result.fetch_df()
        except duckdb.Error as error:
            raise InputError("query", _problem(str(error))) from None


def _problem(text: str) -> Problem:
    return Problem("", text.strip(), "tables: " + ", ".join(TABLES))
