"""Curvature passes on a transformer, in float64, against exact diagonals from autograd."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]
from torch.multiprocessing.spawn import spawn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from soul.curvature.hutchinson import hutchinson_diagonal
from soul.curvature.passes import CurvaturePasses
from soul.curvature.spec import CurvatureSpec
from soul.data.batches import Batch, collate_rows
from soul.data.templates import Encoded
from soul.forward import forward_answers
from soul.optim.base import UpdateRule

# Unequal prompts and answers: padding, and prompts that must not count.
ROWS = [
    Encoded((3, 9, 4, 7, 2, 11, 1), 3),
    Encoded((5, 6, 12, 1), 2),
    Encoded((8, 2, 10, 13, 14, 3, 15, 4, 1), 5),
    Encoded((7, 1), 1),
]
TOKENS = sum(row.answer_length for row in ROWS)
DRAWS = {"ggn": 384, "gnb": 384, "empirical": 384, "hutchinson": 192}


def transformer(*, tied: bool = False, taught: int = 0) -> LlamaForCausalLM:
    """A two-layer model of about 1,200 weights, taught the rows for some steps."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            initializer_range=0.4,
            tie_word_embeddings=tied,
            pad_token_id=None,
            bos_token_id=0,
            eos_token_id=1,
        )
        model = LlamaForCausalLM(config)
    for parent in [m for m in model.modules() if any("norm" in name for name, _ in m.named_children())]:
        for name in dict(parent.named_children()):
            if "norm" in name:  # Llama's own computes in fp32 whatever its weights
                setattr(parent, name, nn.RMSNorm(config.hidden_size, config.rms_norm_eps))
    model = model.double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(taught):
        optimizer.zero_grad()
        (-forward_answers(model, whole()).token_logps().mean()).backward()
        optimizer.step()
    model.zero_grad()
    return model


def whole() -> Batch:
    return collate_rows(ROWS)


def passes(estimator: str, **settings: int) -> CurvaturePasses:
    spec = CurvatureSpec(estimator=estimator, batch=len(ROWS), **settings)  # pyright: ignore[reportArgumentType]
    return CurvaturePasses(spec, ROWS, seed=7)


class Silent(UpdateRule):
    """A rule that nothing is told."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {})


def estimate(model: nn.Module, source: CurvaturePasses, step: int) -> torch.Tensor:
    """Return one refresh's estimate as a vector."""
    found = source.estimate(model, Silent(model), source.plan(step))
    assert found is not None
    assert all(p.grad is None for p in model.parameters())
    return torch.cat([found[p].flatten() for p in model.parameters()])


def flat(grads: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.cat([g.flatten() for g in grads])


def jacobians(model: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Yield each token's Jacobian ``[V, P]``, probabilities and label."""
    params = list(model.parameters())
    answers = forward_answers(model, whole())
    for logits_V, label in zip(answers.logits_NV, answers.targets_N.tolist(), strict=True):
        rows = [flat(torch.autograd.grad(z, params, retain_graph=True)) for z in logits_V]
        yield torch.stack(rows), logits_V.detach().softmax(-1), label


def exact_ggn(model: nn.Module) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for jacobian, p, _ in jacobians(model):
        total = total + (p[:, None] * jacobian**2).sum(0) - (p @ jacobian) ** 2
    return total / TOKENS


def exact_empirical(model: nn.Module) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for jacobian, p, label in jacobians(model):
        total = total + (p @ jacobian - jacobian[label]) ** 2
    return total / TOKENS


def exact_hessian(model: nn.Module) -> torch.Tensor:
    """Return the Hessian's diagonal, a derivative of each entry of the gradient in turn."""
    params = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        loss = -forward_answers(model, whole()).token_logps().mean()
        grads = torch.autograd.grad(loss, params, create_graph=True)
        entries = []
        for p, grad in zip(params, grads, strict=True):
            for i, g in enumerate(grad.flatten()):
                (row,) = torch.autograd.grad(g, p, retain_graph=True, materialize_grads=True)
                entries.append(row.flatten()[i])
    return torch.stack(entries)


EXACT = {"ggn": exact_ggn, "gnb": exact_ggn, "empirical": exact_empirical, "hutchinson": exact_hessian}
MODELS = {"unsure": {}, "tied": {"tied": True}, "sure": {"taught": 60}}


@functools.cache
def model_and_truth(kind: str, matrix: str) -> tuple[LlamaForCausalLM, torch.Tensor]:
    model = transformer(**MODELS[kind])
    return model, EXACT[matrix](model)


def test_models_are_as_sure_as_they_are_called() -> None:
    for kind, low, high in (("unsure", 0.0, 0.4), ("tied", 0.0, 0.4), ("sure", 0.9, 1.0)):
        p = forward_answers(transformer(**MODELS[kind]), whole()).token_logps().exp().mean()
        assert low < float(p.detach()) < high


@pytest.mark.parametrize(
    ("estimator", "kind"),
    [
        ("ggn", "unsure"),
        ("ggn", "tied"),
        ("ggn", "sure"),
        ("gnb", "unsure"),
        ("gnb", "tied"),
        ("empirical", "unsure"),
        ("empirical", "sure"),
        ("hutchinson", "unsure"),
        ("hutchinson", "sure"),
    ],
)
def test_unbiased_with_an_error_that_falls_as_one_over_root_m(estimator: str, kind: str) -> None:
    model, truth = model_and_truth(kind, "ggn" if estimator == "gnb" else estimator)
    source = passes(estimator)
    draws = torch.stack([estimate(model, source, step) for step in range(DRAWS[estimator])])

    # Bias: the mean over all draws, entry by entry in standard errors; over a thousand entries, heavy tails.
    spread = draws.std(0) / math.sqrt(len(draws))
    assert (spread > 0.01 * truth.abs()).float().mean() > 0.5  # the rest: no token's, or one token's alone
    assert ((draws.mean(0) - truth) / (spread + 1e-9 * truth.abs() + 1e-15)).abs().max() < 6.5
    # Scale: the sum of the diagonal is known far better than its entries.
    traces = draws.sum(1)
    assert abs(float(traces.mean() - truth.sum())) < 4 * float(traces.std()) / math.sqrt(len(draws))
    assert float(traces.std()) / math.sqrt(len(draws)) < 0.15 * abs(float(truth.sum()))

    sizes = (4, 16, 64)
    errors = [
        torch.stack([part.mean(0) - truth for part in draws.split(m)]).square().sum(1).mean().sqrt() for m in sizes
    ]
    slope = math.log(errors[-1] / errors[0]) / math.log(sizes[-1] / sizes[0])
    assert -0.62 < slope < -0.38


def test_more_micro_batches_in_a_refresh_are_more_exact() -> None:
    """Squares are added up, not gradients: the error of a refresh falls as one over the root of their number."""
    model, truth = model_and_truth("unsure", "ggn")
    errors = []
    for count, refreshes in ((1, 160), (16, 20)):
        source = passes("ggn", micro_batches=count)
        found = torch.stack([estimate(model, source, step) for step in range(refreshes)])
        errors.append((found - truth).square().sum(1).mean().sqrt())
    assert 3.0 < float(errors[0] / errors[1]) < 5.3  # 4


@pytest.mark.parametrize("estimator", ["ggn", "gnb", "empirical"])
def test_unequal_micro_batches_weigh_by_their_tokens(estimator: str) -> None:
    model = transformer()
    source = passes(estimator)
    (picks,) = source.plan(0)
    parts = [[picks[0]], [picks[1], picks[2]], [picks[3]]]
    tokens = [sum(pick.row.answer_length for pick in part) for part in parts]
    assert len(set(tokens)) > 1
    rule = Silent(model)
    together = source.estimate(model, rule, parts)
    alone = [source.estimate(model, rule, [part]) for part in parts]
    assert together is not None
    for p in model.parameters():
        mixed = sum(n / TOKENS * one[p] for n, one in zip(tokens, alone, strict=True) if one is not None)
        torch.testing.assert_close(together[p], mixed, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("parts", [[4], [1, 3], [2, 1, 1]])
def test_squared_gradients_are_those_of_micro_batches(parts: list[int]) -> None:
    """Adam's second moment: ``sum_b W_b g_b^2`` with ``g_b`` the gradient of a micro-batch's mean loss."""
    model = transformer()
    source = passes("squared_gradient")
    (picks,) = source.plan(0)
    plan = [picks[sum(parts[:i]) :][:n] for i, n in enumerate(parts)]
    assert [len(part) for part in plan] == parts
    found = source.estimate(model, Silent(model), plan)
    assert found is not None
    params, expected = list(model.parameters()), torch.zeros((), dtype=torch.float64)
    for part in plan:
        logps = forward_answers(model, collate_rows([pick.row for pick in part])).token_logps()
        gradient = flat(torch.autograd.grad(-logps.mean(), params))
        expected = expected + len(logps) / TOKENS * gradient**2
    torch.testing.assert_close(torch.cat([found[p].flatten() for p in params]), expected, rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("estimator", ["ggn", "gnb", "empirical"])
def test_noise_belongs_to_the_example(estimator: str) -> None:
    """What else is in a micro-batch, and how far it is padded, changes nothing of an example's gradient."""
    model = transformer()
    source = passes(estimator)
    (picks,) = source.plan(0)
    rule = Silent(model)

    def gradient(part: list) -> torch.Tensor:
        # the whole refresh's weights, whatever part of it is run
        assert source._micro_batch(model, rule, part, 1 / TOKENS, list(model.parameters())) is None
        grads = [p.grad for p in model.parameters()]
        model.zero_grad()
        return torch.cat(
            [
                torch.zeros(p.numel()) if g is None else g.flatten()
                for g, p in zip(grads, model.parameters(), strict=True)
            ]
        )

    one_by_one = torch.stack([gradient([pick]) for pick in picks]).sum(0)
    torch.testing.assert_close(gradient(picks), one_by_one, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(gradient(picks[::-1]), one_by_one, rtol=1e-10, atol=1e-14)


def test_padding_does_not_count() -> None:
    model, truth = model_and_truth("unsure", "ggn")
    total = torch.zeros((), dtype=torch.float64)
    for row in ROWS:  # each row alone, unpadded
        answers = forward_answers(model, collate_rows([row]))
        for logits_V in answers.logits_NV:
            jacobian = torch.stack(
                [flat(torch.autograd.grad(z, list(model.parameters()), retain_graph=True)) for z in logits_V]
            )
            p = logits_V.detach().softmax(-1)
            total = total + ((p[:, None] * jacobian**2).sum(0) - (p @ jacobian) ** 2) / TOKENS
    torch.testing.assert_close(truth, total, rtol=1e-8, atol=1e-14)


def test_differences_agree_with_second_derivatives() -> None:
    model = transformer(taught=20)
    params = list(model.parameters())

    def loss() -> torch.Tensor:
        return -forward_answers(model, whole()).token_logps().mean()

    before = flat(tuple(p.detach().clone() for p in params))
    exact, rough = (
        flat(tuple(hutchinson_diagonal(loss, params, torch.Generator().manual_seed(1), differences=way)))
        for way in (False, True)
    )
    assert (rough - exact).norm() < 1e-3 * exact.norm()
    assert torch.equal(before, flat(tuple(p.detach() for p in params)))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the older name of switching checkpoints on
@pytest.mark.parametrize("reentrant", [False, True])
def test_hutchinson_under_gradient_checkpointing(reentrant: bool) -> None:
    """Reentrant checkpoints cannot be differentiated twice: differences take over."""
    plain, saving = transformer(), transformer()
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    source = passes("hutchinson")
    exact = estimate(plain, source, 0)
    assert (estimate(saving, source, 0) - exact).norm() < (1e-3 if reentrant else 1e-12) * exact.norm()


def of_two_processes(rank: int, folder: str) -> None:
    """What each of two processes does; a function of the module, since a spawned process has to find it by name."""
    torch.set_num_threads(1)
    store = FileStore(str(Path(folder, "store")), 2)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, store=store)
    model = transformer()
    wrapped = DistributedDataParallel(model)
    found = {}
    for estimator in PARALLEL:
        source = passes(estimator, micro_batches=2)
        both = source.estimate(wrapped, Silent(model), source.plan(3))
        assert both is not None
        found[estimator] = [both[p] for p in model.parameters()]
    # the next backward pass averages as ever
    (-forward_answers(wrapped, collate_rows([ROWS[rank]])).token_logps().mean()).backward()
    found["gradient"] = [p.grad for p in model.parameters()]
    torch.save(found, Path(folder, f"{rank}.pt"))
    torch.distributed.barrier()
    # All is done and written. Taking gloo down in an orderly way leaves one of the two waiting for ever, now and then.
    os._exit(0)


PARALLEL = ("ggn", "hutchinson")


def test_two_processes_of_two_are_one_of_four(tmp_path: Path) -> None:
    spawn(of_two_processes, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name in (*PARALLEL, "gradient"):
        assert all(torch.equal(a, b) for a, b in zip(ranks[0][name], ranks[1][name], strict=True))
    model = transformer()
    for estimator in PARALLEL:
        source = passes(estimator, micro_batches=4)
        alone = source.estimate(model, Silent(model), source.plan(3))
        assert alone is not None
        for p, together in zip(model.parameters(), ranks[0][estimator], strict=True):
            torch.testing.assert_close(together, alone[p], rtol=1e-9, atol=1e-12)
