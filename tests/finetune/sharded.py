"""The command line of fine-tuning on CPUs, sharded by accelerate as it is on GPUs.

accelerate 1.15 shards on any device but a CPU: it takes FSDP up where `PartialState().distributed_type` is MULTI_GPU,
MULTI_XPU, …, and `--use_cpu True` makes it MULTI_CPU, with which `--fsdp` is ignored and DDP runs. That word is all
that is changed here. What shards, gathers, saves and resumes is accelerate's and the package's own.
"""

from accelerate import DistributedType, PartialState
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from flagembedding_matryoshka.finetune import MatryoshkaRunner
from flagembedding_matryoshka.finetune.__main__ import build_parser


def main():
    model_args, data_args, training_args = build_parser().parse_args_into_dataclasses()
    assert training_args.device.type == "cpu" and PartialState().distributed_type == DistributedType.MULTI_CPU
    PartialState().distributed_type = DistributedType.MULTI_GPU
    runner = MatryoshkaRunner(model_args, data_args, training_args)
    runner.run()
    model = runner.trainer.model
    layers = [module for name, module in model.named_modules() if name.rpartition(".")[0].endswith("layers")]
    assert len(layers) == model.config.num_hidden_layers
    assert all(isinstance(module, FSDPModule) for module in (model, *layers))
    parameters = list(model.parameters())
    assert all(isinstance(weights, DTensor) and weights.placements == (Shard(0),) for weights in parameters)
    here, all_in_all = (sum(map(count, parameters)) for count in (lambda w: w.to_local().numel(), lambda w: w.numel()))
    assert 0.4 * all_in_all < here < 0.6 * all_in_all


if __name__ == "__main__":
    main()
