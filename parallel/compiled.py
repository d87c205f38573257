"""Decoder layers that torch.compile runs, each as one graph.

The scan, norms, rotations, the feed-forward's product and projections are operators that it takes
as they are (`kernels`); it fuses what is left between them. Gradients of weights reach their
float32 sums through autograd, rounded to the weights' dtype once a micro-batch.
"""

import torch

from parallel.build import BuiltStage

# Graphs of one function, at most: of a kind of layer with and without gradients, followed by a norm
# or not, for each length of rows and with one document a row or several.
RECOMPILE_LIMIT = 64


def compile_layers(built: BuiltStage, backend: str = "inductor") -> None:
    """Compile the stage's layers, each when it first runs.

    Their tensor-parallel and context-parallel groups must have one rank, and their parameters must
    be whole (no ZeRO 3). A layer that cannot be one graph raises PyTorch's error when it runs.
    """
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    for chunk in built.chunks:
        for layer in chunk.model.layers.values():
            layer.compile(fullgraph=True, backend=backend)
