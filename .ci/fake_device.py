"""Finds tensors of different devices in vqldm.py without a GPU: python .ci/fake_device.py
A forgotten .to(device) fails on a GPU only. So all commands run here on a device named fake, whose
tensors wrap CPU tensors, and each operation is checked as on CUDA. Last, a mistake is planted, and
must be found. Not tested: numbers, bf16, memory, speed, what CUDA lacks, several GPUs."""

import importlib, sys, tempfile, torch, traceback
from pathlib import Path
from torch.utils import backend_registration as backend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# Private names. If another torch lacks them, this fails, and somebody should look for others.
backend._DummyBackendModule.get_amp_supported_dtype = lambda self: [torch.bfloat16]
backend._setup_privateuseone_for_python_backend("fake")  # torch learns the name
torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(1, device=…) makes, then moves
root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root / "tools")]
import evaluate, vqldm

vqldm.COMMANDS["evaluate"] = evaluate.EvaluateConfig, evaluate.evaluate


class Fake(torch.Tensor):  # its numbers are in twin, a CPU tensor
    def __new__(cls, twin):
        like = twin.shape, twin.stride(), twin.storage_offset()
        self = torch.Tensor._make_wrapper_subclass(cls, *like, dtype=twin.dtype, device="fake:0")
        self.twin = twin
        return self

    __torch_dispatch__ = NotImplemented  # Check does it
    __torch_function__ = torch._C._disabled_torch_function_impl


for name in "__repr__", "__format__", "__reduce_ex__", "tolist":  # torch refuses them to wrappers
    setattr(Fake, name, lambda self, *a, name=name: getattr(self.twin, name)(*a))

found = {}  # mistakes, and where they are
INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}
NUMBER = {*INDEX, "fill_", "masked_fill", "masked_fill_"}


class Check(TorchDispatchMode):  # while it is on, it is given each operation
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, kind = dict(kwargs or {}), op.overloadpacket.__name__
        leaves = tree_leaves((args, kwargs))
        fakes = [x for x in leaves if isinstance(x, Fake)]
        wrong = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, Fake)]
        own = {id(x): x for x in wrong} | {id(x.twin): x for x in fakes}
        device = fakes[0].device if fakes else torch.device("cpu")  # of the result
        if kwargs.get("device"):  # a new tensor, such as zeros(5, device="fake")
            device, kwargs["device"] = kwargs["device"], torch.device("cpu")
        # CUDA takes from the CPU: indices, and numbers (0 dimensions) in elementwise operations.
        if kind in INDEX and isinstance(args[0], Fake):
            wrong = [x for x in wrong if all(x is not index for index in args[1])]
        if kind in NUMBER or torch.Tag.pointwise in op.tags:
            wrong = [x for x in wrong if x.ndim or (x is args[0] and op._schema.is_mutable)]
        wrong = wrong if fakes and kind not in ("copy_", "_to_copy") else []
        wrong += [x for x in leaves if isinstance(x, torch.Generator) and x.device != device]
        if wrong:  # remember it once, with the lines of vqldm.py that led here
            lines = [
                f
                for f in traceback.extract_stack()
                if f.filename in (vqldm.__file__, evaluate.__file__)
            ]
            found[f"MISTAKE {op}" + "".join(f"\n    {f.lineno}: {f.line}" for f in lines)] = op
        args, kwargs = tree_map_only(Fake, lambda x: x.twin, (args, kwargs))
        new, out = Fake if device.type == "fake" else lambda x: x, op(*args, **kwargs)
        return tree_map_only(torch.Tensor, lambda x: own[id(x)] if id(x) in own else new(x), out)


COMMANDS = """train-vq --preset tiny --n-images 60 --batch-size 27 --epochs 1 --out {0}/vq
train-vq --resume --epochs 2 --out {0}/vq
train-ldm --preset tiny --epochs 1 --steps 5 --vq {0}/vq --out {0}/ldm
train-ldm --resume --epochs 2 --out {0}/ldm
sample --n 8 --eta 1 --ckpt {0}/ldm --out {0}/samples
evaluate --n 16 --ckpt {0}/ldm
sample --n 4 --ckpt {0}/ldm --out {0}/planted"""
with tempfile.TemporaryDirectory() as folder, Check():
    for line in COMMANDS.format(folder).splitlines():
        if line.endswith("planted"):  # now the classes of samples stay on the CPU
            code, mistakes = Path(vqldm.__file__).read_bytes(), [*found]
            Path(folder, "vqldm.py").write_bytes(code.replace(b".to(self.device)", b"", 1))
            sys.path.insert(0, folder)
            importlib.reload(vqldm)
        vqldm.main([*line.split(), "--device", "fake"])
print(*mistakes, f"{len(mistakes)} mistakes", sep="\n")
sys.exit(bool(mistakes) if len(found) > len(mistakes) else "the planted mistake was not found")
