"""Makes a copy of the model in training that can decode: the same tensors in modules without sequence parallelism.

One token cannot be sharded along the sequence, and megatron-core's layers decide at construction whether they shard. So
rollouts run on a second set of modules. It needs no memory: it is built on the meta device, and its parameters, buffers
and adapters are those of the first.
"""

from torch import Tensor

from substrate.distributed.groups import Parallel
from substrate.model.hybrid import HybridModel, build_model


def decoding_twin(model: HybridModel, parallel: Parallel) -> HybridModel:
    """Returns a model for `decode.decode` that uses `model`'s own tensors, now and after every later step.

    `model` must have all its layers on this rank (pp 1). The adapters are shared as modules, with their `training`
    flag, so the caller must set `model.eval()` before it decodes.
    """
    twin = build_model(model.architecture, parallel, device="meta", sequence_parallel=False)
    sources = dict(model.named_modules())
    for name, module in list(twin.named_modules()):
        source = sources[name]
        module._parameters, module._buffers = source._parameters, source._buffers
        for attribute, value in vars(source).items():
            if isinstance(value, Tensor):  # a layer's own view of its parameters
                setattr(module, attribute, value)
        if getattr(source, "adapter", None) is not None:
            module.adapter = source.adapter
    return twin.eval()
