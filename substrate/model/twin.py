"""The model in training, ready to decode: the same tensors under modules built without sequence parallelism.

One token cannot be sharded along the sequence, and megatron-core's layers are told at their making whether they shard.
So rollouts run on a second set of modules, which costs no memory: it is built on the meta device, and its parameters,
buffers and adapters are those of the first.
"""

from torch import Tensor

from substrate.distributed.groups import Parallel
from substrate.model.hybrid import HybridModel, build_model


def decoding_twin(model: HybridModel, parallel: Parallel) -> HybridModel:
    """A model for `decode.decode` that computes with `model`'s own tensors, now and after every later step.

    `model` has all of its layers here (pp 1). The adapters are shared as modules, and with them their `training` flag:
    whoever decodes has set `model.eval()`.
    """
    twin = build_model(model.architecture, parallel, device="meta", sequence_parallel=False)
    sources = dict(model.named_modules())
    for name, module in list(twin.named_modules()):
        source = sources[name]
        module._parameters, module._buffers = source._parameters, source._buffers
        for attribute, value in vars(source).items():
            if isinstance(value, Tensor):  # a view of parameters that a layer keeps for itself
                setattr(module, attribute, value)
        if getattr(source, "adapter", None) is not None:
            module.adapter = source.adapter
    return twin.eval()
