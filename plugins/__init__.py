"""The two attention operators: their contract, PyTorch ops, ONNX function bodies and GPU kernels.

Importing this package is cheap: `plugins.contract` has no dependencies, `plugins.nodes.ops` needs PyTorch, and
`plugins.nodes.functions` needs onnxscript. Import the one that is needed.
"""
