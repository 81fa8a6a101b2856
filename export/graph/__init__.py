"""The model as ONNX graphs."""
