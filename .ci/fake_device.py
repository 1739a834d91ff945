"""Finds tensors of different devices in vqldm.py without a GPU: python .ci/fake_device.py
A forgotten .to(device) fails on a GPU only. So all commands run here on a device named fake, whose
tensors wrap CPU tensors. Each operation is checked as on CUDA, then computed on the CPU. After a
mistake the run goes on, so it finds all. Weights and measures must be the CPU's, bit for bit. Last,
a mistake is planted in a copy of vqldm.py, and must be found. Not tested: bf16, memory, speed, what
CUDA lacks or computes differently, several GPUs."""

import importlib, io, json, sys, tempfile, traceback
from contextlib import redirect_stdout
from pathlib import Path
import torch
from torch.utils import backend_registration as backend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

try:  # private names, which another torch may lack
    backend._DummyBackendModule.get_amp_supported_dtype = lambda self: [torch.bfloat16]
    backend._setup_privateuseone_for_python_backend("fake")  # torch learns the name
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(1, device=…) makes, then moves
except (AttributeError, TypeError, RuntimeError) as e:
    print(f"passed by: torch {torch.__version__} cannot make a fake device ({e})")
    sys.exit(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import vqldm

# torch chooses kernels by device. Both devices must compute with the same, or last digits differ.
torch.cpu._is_avx512_bf16_supported = lambda: False  # fp32 on both
torch.backends.cuda.enable_flash_sdp(False)  # attention by the same operations
# SiLU's gradient is one kernel on CPU and CUDA, but several steps on a device that registers none.
library = torch.library.Library("aten", "IMPL", "PrivateUse1")
library.impl("silu_backward", lambda *a: a)  # never called, as Check comes first


class Fake(torch.Tensor):  # its numbers are in twin, a CPU tensor
    def __new__(cls, twin):
        self = torch.Tensor._make_wrapper_subclass(
            cls, twin.shape, twin.stride(), twin.storage_offset(), dtype=twin.dtype, device="fake:0"
        )
        self.twin = twin
        return self

    __torch_dispatch__ = NotImplemented  # Check does it
    __torch_function__ = torch._C._disabled_torch_function_impl


for name in "__repr__", "__format__", "__reduce_ex__", "tolist":  # torch refuses them to wrappers
    setattr(Fake, name, lambda self, *a, name=name: getattr(self.twin, name)(*a))

found, layouts = set(), {}  # mistakes; what GroupNorm was given, see Check


def mistake(op, *words):  # tell it once, with the lines of vqldm.py that led here
    lines = [f for f in traceback.extract_stack() if f.filename == vqldm.__file__]
    place = [f"line {f.lineno}: {f.line}" for f in lines] or ["in backward()"]
    if (op, *place) not in found:
        print("MISTAKE", op, *words, *[f"\n    {line}" for line in place], flush=True)
    found.add((op, *place))


aten = torch.ops.aten
ACROSS = aten.copy_, aten._to_copy  # what moves numbers between devices
INDEX = aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_
NUMBER = *INDEX, aten.fill_, aten.masked_fill, aten.masked_fill_


class Check(TorchDispatchMode):  # while it is on, it is given each operation
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, kind = dict(kwargs or {}), op.overloadpacket
        leaves = tree_leaves((args, kwargs))
        fakes = [x for x in leaves if isinstance(x, Fake)]
        wrong = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, Fake)]
        own = {id(x): x for x in wrong} | {id(x.twin): x for x in fakes}
        assert all(x.stride() == x.twin.stride() for x in fakes), op  # no layout is lost
        device = fakes[0].device if fakes else torch.device("cpu")  # of the result
        if kwargs.get("device"):  # a new tensor, such as zeros(5, device="fake")
            device, kwargs["device"] = kwargs["device"], torch.device("cpu")
        # CUDA takes from the CPU: indices, and numbers (0 dimensions) in elementwise operations.
        if kind in INDEX and isinstance(args[0], Fake):
            wrong = [x for x in wrong if all(x is not index for index in args[1])]
        if kind in NUMBER or torch.Tag.pointwise in op.tags:
            wrong = [x for x in wrong if x.ndim or (x is args[0] and op._schema.is_mutable)]
        if fakes and wrong and kind not in ACROSS:
            mistake(op, [(str(x.device), *x.shape) for x in fakes + wrong])
        for x in leaves:
            if isinstance(x, torch.Generator) and x.device.type != device.type:
                mistake(op, f"a generator of {x.device} for a tensor on {device}")
        args, kwargs = tree_map_only(Fake, lambda x: x.twin, (args, kwargs))
        # Before GroupNorm's gradient, torch turns channels last to first, but not on a CPU. That
        # adds up in another order, so here the layout of x becomes again what it was.
        if kind is aten.native_group_norm_backward:  # args: gradient, x, means, …
            old = layouts[args[2].data_ptr()]
            args = *[x.new_empty_strided(x.shape, old).copy_(x) for x in args[:2]], *args[2:]
        out = op(*args, **kwargs)
        if kind is aten.native_group_norm:  # args: x, …; out: y, means, …
            layouts[out[1].data_ptr()] = args[0].stride()
        new = Fake if device.type == "fake" else lambda x: x
        # An argument that was changed in place is returned as the same object.
        return tree_map_only(torch.Tensor, lambda x: own[id(x)] if id(x) in own else new(x), out)


ALL = (
    "train-vq --preset tiny --n-images 60 --batch-size 27 --epochs 1 --out {0}/vq",
    "train-vq --resume --epochs 2 --out {0}/vq",
    "train-ldm --preset tiny --epochs 1 --steps 5 --vq {0}/vq --out {0}/ldm",
    "train-ldm --resume --epochs 2 --out {0}/ldm",
    "sample --n 8 --ckpt {0}/ldm --out {0}/samples",
    "evaluate --n 16 --ckpt {0}/ldm",
)


def results(device, folder, commands=ALL):  # run them -> measures and weights by name
    for line in commands:
        print("==", line, "--device", device)
        vqldm.main([*line.format(folder).split(), "--device", device])
    state = torch.load(folder / "ldm/last.pt", weights_only=True)
    weights = {name: x.tolist() for name, x in {**state["ema"], **state["vq"]["model"]}.items()}
    return json.loads((folder / "ldm/metrics.json").read_text()) | weights


with tempfile.TemporaryDirectory() as folder:
    with Check():
        fake = results("fake", Path(folder, "fake"))
    cpu, mistakes = results("cpu", Path(folder, "cpu")), len(found)
    code = Path(vqldm.__file__).read_bytes()  # now the noise of samples stays on the CPU
    Path(folder, "vqldm.py").write_bytes(code.replace(b"(drawn).to(self.device)", b"(drawn)"))
    sys.path.insert(0, folder)
    importlib.reload(vqldm)
    with Check(), redirect_stdout(io.StringIO()):
        results("fake", Path(folder, "fake"), ["sample --n 4 --ckpt {0}/ldm --out {0}/planted"])
differ = {name for name in cpu if cpu[name] != fake[name]} - {"device", "ckpt"}
print(mistakes, "mistakes; not the CPU's, bit for bit:", differ or "none")
sys.exit(bool(mistakes or differ) if len(found) > mistakes else "the planted mistake was not found")
