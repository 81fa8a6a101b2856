"""The operators as nodes of graphs: PyTorch's, ONNX's and TensorRT's."""
