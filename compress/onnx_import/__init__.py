"""ONNX files as torch networks of plain layers, to be compressed in one shot and simulated (the extra ``onnx``).

Source of the meaning of every operator: the ONNX operator specification, https://onnx.ai/onnx/operators/.
"""

from __future__ import annotations

from compress.onnx_import.reading import ImportedNetwork, import_onnx

__all__ = ["ImportedNetwork", "import_onnx"]
