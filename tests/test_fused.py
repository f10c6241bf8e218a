"""The stand-in as few, fused operations computes its formula; operations are counted as torch counts them."""

import copy

import pytest
import torch
from families import WIRINGS, build
from pruned import prune, stand_in
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdprune.evaluation.flops import forward_flops
from kdprune.model.modeling_kdp import StandIn, cosines_and_sines
from kdprune.testing import KINDS

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FORMS = [{"kind": kind, "hidden": hidden, "residual": alone, "normalize": alone}
         for kind in ("fourier", "mlp", "linear") for hidden in (0, 24) for alone in (True, False)]


def states(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def formula(module: StandIn, x: Tensor) -> Tensor:
    """The stand-in step by step, in the dtype of x, its normalisation in float32 or wider."""
    z = x
    if module.normalize:
        wide = x if x.dtype == torch.float64 else x.float()
        z = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + module.eps)).to(x.dtype)
    if module.kind == "fourier":
        p = module.phase(z)
        z = torch.cat((torch.cos(p), torch.sin(p)), dim=-1)
    elif module.kind == "mlp":
        z = nn.functional.gelu(module.phase(z))
    if module.hidden:
        z = nn.functional.gelu(module.lift(z))
    y = module.readout(z)
    return x + y if module.residual else y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (2, 5, 107), (0, 8), (4, 512, 517)], ids=str)
def test_features_are_the_cosines_and_the_sines_to_the_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    p = states(*shape, scale=30.0).to(dtype)
    expected = torch.cat((torch.cos(p), torch.sin(p)), dim=-1)
    assert torch.equal(cosines_and_sines(p), expected)
    assert torch.equal(cosines_and_sines(p.clone().requires_grad_()).detach(), expected)


def test_many_of_them_are_not_made_twice() -> None:
    """One buffer and two writes into it; a copy, or a second buffer, is an operation that is not in the list."""
    p = states(2048, 512)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        cosines_and_sines(p)
    names = {event.key for event in profile.key_averages()}
    assert {"aten::cos", "aten::sin"} <= names
    assert not names & {"aten::cat", "aten::copy_", "aten::_to_copy", "aten::resize_"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
@torch.no_grad()
def test_the_stand_in_is_its_formula(dtype: torch.dtype, form: dict[str, object]) -> None:
    module = stand_in(**form).to(dtype)  # type: ignore[arg-type]
    x = states(2, 9, 32).to(dtype)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(module(x), formula(module, x), rtol=4 * unit, atol=64 * unit)
    assert module(x).dtype == dtype
    # … and in float64 it is the same function, apart from what the narrow dtype rounds on the way.
    exact = formula(copy.deepcopy(module).double(), x.double())
    assert float((module(x).double() - exact).norm() / exact.norm()) < 8 * unit


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
def test_its_gradients_are_right(form: dict[str, object]) -> None:
    module = stand_in(**form, features=5).double()  # type: ignore[arg-type]
    x = states(3, 32, scale=1.0).requires_grad_()
    names, parameters = zip(*module.named_parameters(), strict=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)
    with torch.no_grad():
        without = module(x)
    assert torch.equal(module(x).detach(), without)


@pytest.mark.parametrize("kind", ["fourier", "mlp", "linear"])
def test_it_compiles_and_exports_as_one_graph(kind: str) -> None:
    module = stand_in(kind=kind)
    x = states(2, 9, 32).float()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            found = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
            torch.testing.assert_close(found, module(x))
    exported = torch.export.export(module, (x,))
    torch.testing.assert_close(exported.module()(x), module(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")  # of parts of torch that inductor imports
@torch.no_grad()
def test_compiled_cosines_and_sines_are_one_loop() -> None:
    from torch._inductor.utils import run_and_get_code  # private, but the only way to see what was generated

    p = states(64, 107).float()
    found, (source,) = run_and_get_code(torch.compile(cosines_and_sines, fullgraph=True), p)
    torch.testing.assert_close(found, cosines_and_sines(p), rtol=1e-5, atol=1e-5)
    assert source.count('extern "C"') == 1, "expected one kernel"
    assert ".cos()" in source
    assert ".sin()" in source


def test_what_replaces_a_linear_map_is_called() -> None:
    """Quantisers and LoRA put modules of their own in the place of nn.Linear."""

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Linear):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    module = stand_in()
    x = states(2, 9, 32).float()
    expected = copy.deepcopy(module)
    with torch.no_grad():
        for linear in (expected.phase, expected.readout):
            for parameter in linear.parameters():
                parameter *= 2
    module.phase, module.readout = Doubled(module.phase), Doubled(module.readout)  # type: ignore[assignment]
    torch.testing.assert_close(module(x), expected(x))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft, newer releases
def test_lora_on_phase_and_readout_learns() -> None:
    peft = pytest.importorskip("peft")
    model = prune(build("llama3"), "mixed")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["phase", "readout"]))
    ids = torch.arange(3, 15)[None]
    wrapped(input_ids=ids, labels=ids).loss.backward()
    learned = [name for name, p in wrapped.named_parameters() if p.grad is not None and "lora_B" in name]
    assert any("phase" in name for name in learned)
    assert any("readout" in name for name in learned)
    assert all(float(p.grad.abs().max()) > 0 for n, p in wrapped.named_parameters() if n in learned)


@pytest.mark.parametrize(("name", "kinds"), [
    (name, tuple(KINDS) if name == "llama3.1" else ("mixed", "heads")) for name in ("opt", *WIRINGS)])
@torch.no_grad()
def test_operations_are_counted_as_torch_counts_them(name: str, kinds: tuple[str, ...]) -> None:
    for model in (build(name), *(prune(build(name), kind) for kind in kinds)):
        model.set_attn_implementation("eager")
        ids = torch.arange(3, 9).repeat(2, 1)
        with FlopCounterMode(display=False) as counter:
            cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        assert forward_flops(model, 2, 6) == counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            model(ids[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        if not getattr(model.config, "sliding_window", None):  # with one, the cache forgets
            assert forward_flops(model, 2, 1, past=6) == counter.get_total_flops()
