"""What passes pick, how they leave the model and its gradients, and when the trainer makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, TrainerCallback

from soul.curvature.passes import CurvaturePasses
from soul.curvature.picks import choose
from soul.curvature.quiet import full_precision, without_noise
from soul.curvature.spec import CurvatureSpec
from soul.data.templates import Encoded
from soul.optim.base import UpdateRule
from soul.registry import OBJECTIVES, OPTIMIZERS
from soul.trainer import LogCallback, UnlearnTrainer, make_dataset
from soul.training import TrainingSpec

ROWS = [Encoded((*range(2, 4 + i % 5), i, 1), 2 + i % 2) for i in range(40)]


class Told(UpdateRule):
    """A rule that keeps what it is told."""

    def __init__(self, model: nn.Module, *, fault: bool = False) -> None:
        super().__init__(model.parameters(), {})
        self.estimates: list[Any] = []
        self.gradients: list[dict[torch.Tensor, torch.Tensor]] = []
        self.fault = fault

    def update_curvature(self, estimate: Any = None) -> None:
        if self.fault:
            raise KeyError("a fault")
        self.estimates.append(estimate)
        params = [p for group in self.param_groups for p in group["params"]]
        self.gradients.append({p: p.grad.clone() for p in params if p.grad is not None})


def rows_of(picks: list) -> list[Encoded]:
    return [pick.row for pick in picks]


def test_picks_follow_seed_step_and_content() -> None:
    first = choose(ROWS, 8, 0, 10, "rows")
    assert choose(ROWS, 8, 0, 10, "rows") == first
    assert len(set(rows_of(first))) == 8
    for other in (choose(ROWS, 8, 1, 10, "rows"), choose(ROWS, 8, 0, 20, "rows"), choose(ROWS, 8, 0, 10, "text")):
        assert set(rows_of(other)) != set(rows_of(first))
        assert not {pick.seed for pick in other} & {pick.seed for pick in first}
    # The order of the set does not matter, nor do examples that were not picked.
    assert choose(ROWS[::-1], 8, 0, 10, "rows") == first
    left = [row for row in ROWS if row in rows_of(first) or row.key % 2]
    assert len(left) < len(ROWS)
    assert choose(left, 8, 0, 10, "rows") == first


def test_picks_repeat_only_after_all_were_chosen_and_then_with_other_noise() -> None:
    picks = choose(ROWS, 100, 0, 0, "rows")
    assert len(picks) == 100
    assert set(rows_of(picks[:40])) == set(rows_of(picks[40:80])) == set(ROWS)
    assert len(set(rows_of(picks[80:]))) == 20
    assert len({pick.seed for pick in picks}) == 100
    for lap in (picks[:40], picks[40:80], picks[80:]):
        assert [len(pick.row) for pick in lap] == sorted((len(pick.row) for pick in lap), reverse=True)


def test_equal_examples_do_not_share_their_noise() -> None:
    picks = choose([ROWS[0], ROWS[0], ROWS[0]], 3, 0, 0, "rows")
    assert len({pick.seed for pick in picks}) == 3


def test_every_example_is_as_likely_as_any_other() -> None:
    counts = dict.fromkeys(ROWS, 0)
    for step in range(500):
        for row in rows_of(choose(ROWS, 8, 3, step, "rows")):
            counts[row] += 1
    # binomial, 500 draws of 1 in 5: mean 100, standard deviation 9
    assert max(abs(count - 100) for count in counts.values()) < 40


def test_micro_batches_mix_examples_and_text() -> None:
    text = [Encoded((i, i + 1, i + 2), 1) for i in range(200, 205)]
    source = CurvaturePasses(CurvatureSpec(batch=6, micro_batches=3, general_text=2, warm_start=5), ROWS, text)
    for step, count in ((0, 5), (10, 3)):
        plan = source.plan(step)
        assert len(plan) == count
        for picks in plan:
            assert len([row for row in rows_of(picks) if row in ROWS]) == 6
            assert len([row for row in rows_of(picks) if row in text]) == 2
    few = CurvaturePasses(CurvatureSpec(batch=8, general_text=9), ROWS[:3], text)
    assert [len(picks) for picks in few.plan(0)] == [3 + 5]  # no example twice in a pass where one pass is all


def test_like_lengths_share_a_micro_batch() -> None:
    rows = [Encoded(tuple(range(i, i + 4 + i % 3)), 1) for i in range(12)]
    text = [Encoded(tuple(range(i, i + 30 + i)), 1) for i in range(6)]
    source = CurvaturePasses(CurvatureSpec(batch=4, general_text=2, warm_start=3), rows, text)
    plan = source.plan(0)
    assert [len(picks) for picks in plan] == [6, 6, 6]
    lengths = [len(pick.row) for picks in plan for pick in picks]
    assert lengths == sorted((len(row) for row in rows + text), reverse=True)
    assert sorted(map(id, (pick.row for picks in plan for pick in picks))) == sorted(map(id, rows + text))


def test_nothing_to_pick_from_is_an_error() -> None:
    with pytest.raises(ValueError, match="no such examples"):
        CurvaturePasses(CurvatureSpec(), [])
    with pytest.raises(ValueError, match=r"objective_squared makes no passes: set curvature\.warm_start to 0"):
        CurvaturePasses(CurvatureSpec(estimator="objective_squared", warm_start=2), ROWS)


def noisy_llama(make_model: Callable[..., Any]) -> Any:
    model = make_model(0)
    model.config.attention_dropout = 0.4
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.4
    return model


def noisy_gpt2(_: Any) -> Any:
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 340}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3))


def noisy_opt(_: Any) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    noise: dict[str, Any] = {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.5}
    return OPTForCausalLM(OPTConfig(**sizes, **noise, vocab_size=340, word_embed_proj_dim=16))


def noisy_adapter(make_model: Callable[..., Any]) -> Any:
    model = get_peft_model(make_model(0), LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    return model


NOISY = [noisy_llama, noisy_gpt2, noisy_opt, noisy_adapter]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the older name of switching checkpoints on
@pytest.mark.parametrize("make", NOISY, ids=lambda make: make.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_checkpointing_stays_on(make_model: Any, make: Any, training: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = make(make_model)
    source = CurvaturePasses(CurvatureSpec(batch=5, micro_batches=2), ROWS)
    quiet = in_eval_mode(model, source)
    model.train(training)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    layer = next(
        m for m in model.modules() if type(m).__name__ in ("LlamaDecoderLayer", "GPT2Block", "OPTDecoderLayer")
    )
    next(layer.children()).register_forward_pre_hook(lambda *_: calls.append(1))
    model.register_forward_pre_hook(lambda *_: (torch.rand(1), None)[1])  # some draw also where they drop nothing
    before, stream = traces(model), torch.get_rng_state()
    assert any(value > 0 and (name == "p" or "drop" in name) for (_, name), value in before.items())
    noisy = source.estimate(model, Told(model), source.plan(0))
    assert noisy is not None
    assert set(noisy) == set(quiet)
    for p, value in quiet.items():
        torch.testing.assert_close(noisy[p], value, rtol=1e-4, atol=1e-12)
    assert len(calls) == 4  # of two micro-batches: forward, and again when the gradients were wanted
    assert traces(model) == before
    assert torch.equal(torch.get_rng_state(), stream)


def in_eval_mode(model: Any, source: CurvaturePasses) -> dict[torch.Tensor, torch.Tensor]:
    """Return the estimate of the refresh before step 0 from the model as evaluation runs it."""
    model.eval()
    params = [p for p in model.parameters() if p.requires_grad]
    plan = source.plan(0)
    weight = 1 / sum(pick.row.answer_length for picks in plan for pick in picks)
    total = {p: torch.zeros_like(p) for p in params}
    for picks in plan:
        source._micro_batch(model, Told(model), picks, weight, params)
        for p in params:
            assert p.grad is not None
            total[p] += p.grad**2
        model.zero_grad()
    return total


def traces(model: Any) -> dict[tuple[str, str], float]:
    """Return all modes and numbers that modules and configs hold."""
    holders = {"config": model.config, **dict(model.named_modules())}
    return {(n, k): v for n, m in holders.items() for k, v in vars(m).items() if isinstance(v, (bool, float))}


def test_dropout_comes_back_after_a_fault(make_model: Any) -> None:
    model = noisy_llama(make_model).train()
    before = traces(model)
    context = without_noise(model)
    context.__enter__()
    assert traces(model) != before
    assert not context.__exit__(KeyError, KeyError("a fault"), None)
    assert traces(model) == before


def test_full_precision_reaches_behind_accelerate() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # another test's precision would stay in force
    model: Any = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(nn.Linear(4, 4, bias=False))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    exact = x @ model.weight.T
    assert not torch.equal(model(x), exact)
    with full_precision(model):
        assert torch.equal(model(x), exact)
    assert not torch.equal(model(x), exact)
    AcceleratorState._reset_state()


@pytest.mark.parametrize("estimator", ["ggn", "gnb", "empirical", "hutchinson"])
def test_a_refresh_begins_and_ends_with_empty_gradients(make_model: Any, estimator: Any) -> None:
    model = make_model(0)
    source = CurvaturePasses(CurvatureSpec(estimator=estimator), ROWS)
    told = Told(model)
    source.refresh(model, told, 0)
    assert all(p.grad is None for p in model.parameters())
    if estimator == "hutchinson":
        assert told.estimates[0] is not None  # signed: no gradient's square is it
        assert min(float(value.min()) for value in told.estimates[0].values()) < 0
        assert told.gradients == [{}]
    else:
        assert told.estimates == [None]  # a single backward pass: no buffer, the rule squares the gradients
        assert len(told.gradients[0]) == len(list(model.parameters()))
        explicit = source.estimate(model, told, source.plan(0))
        assert explicit is not None
        for p, grad in told.gradients[0].items():
            assert torch.equal(grad.square(), explicit[p])
    with pytest.raises(KeyError, match="a fault"):
        source.refresh(model, Told(model, fault=True), 0)
    assert all(p.grad is None for p in model.parameters())
    model.lm_head.weight.grad = torch.zeros_like(model.lm_head.weight)
    with pytest.raises(AssertionError, match="empty gradients"):
        source.refresh(model, told, 0)


def test_an_estimate_has_a_value_for_every_trainable_parameter(make_model: Any) -> None:
    model = make_model(0, torch.bfloat16)
    model.model.layers[0].requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.bfloat16)))
    source = CurvaturePasses(CurvatureSpec(micro_batches=2), ROWS)
    estimate = source.estimate(model, Told(model), source.plan(0))
    assert estimate is not None
    assert set(estimate) == {p for p in model.parameters() if p.requires_grad}
    assert {value.dtype for value in estimate.values()} == {torch.float32}
    assert torch.equal(estimate[model.unused], torch.zeros(3))


def test_a_warm_start_is_worth_its_number_of_refreshes(make_model: Any) -> None:
    model = make_model(0)
    source = CurvaturePasses(CurvatureSpec(warm_start=6, micro_batches=2, cache=False), ROWS)
    told = Told(model)
    source.refresh(model, told, 0)
    assert len(told.estimates) == 3
    assert told.estimates[0] is told.estimates[1] is told.estimates[2] is not None
    source.refresh(model, told, 10)
    assert len(told.estimates) == 4


class Watching(Told):
    def curvature_state(self) -> dict[str, torch.Tensor]:
        return {}


def test_what_cannot_be_done_is_refused(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(0)
    for estimator in ("hutchinson", "squared_gradient"):
        source = CurvaturePasses(CurvatureSpec(estimator=estimator), ROWS)
        with pytest.raises(
            ValueError, match=r"the model's layers: curvature\.estimator must be one of ggn, gnb, empirical$"
        ):
            source.refresh(model, Watching(model), 0)
    monkeypatch.setattr("soul.processes.place", lambda: (0, 2))
    with pytest.raises(ValueError, match=r"not LlamaForCausalLM: use one of these \(examples/accelerate\), or one"):
        source.refresh(model, Told(model), 0)


@pytest.fixture
def make_trainer(
    tokenizer: Any, make_model: Any, forget_set: Any, retain_set: Any, refusals: Any, tmp_path: Any
) -> Callable[..., UnlearnTrainer]:
    def make(optimizer: Any, *, objective: str = "grad_diff", retain: Any = retain_set, **settings: Any) -> Any:
        settings = {"batch_size": 2, "epochs": 2, "precision": "float32", "save_steps": 0, **settings}
        training, loss = TrainingSpec(**settings), OBJECTIVES.get(objective)()
        log = LogCallback(None)
        trainer = UnlearnTrainer(
            noisy_llama(make_model),
            training.arguments(tmp_path),
            dataset=make_dataset(tokenizer, forget_set, retain, loss, training, refusals),
            objective=loss,
            optimizer=optimizer,
            training=training,
            callbacks=[log],
        )
        log.trainer = trainer
        return trainer

    return make


def sophia(**settings: Any) -> Any:
    return OPTIMIZERS.get("sophia")(lr=1e-4, curvature=CurvatureSpec(**settings))


def test_embeddings_are_damped_and_counted_apart_in_training(make_trainer: Any) -> None:
    """Few rows of an embedding have any curvature: their mean would leave the matrices with next to no damping."""
    trainer = make_trainer(sophia(interval=1), max_steps=2)
    trainer.train()
    rule = trainer.update_rule
    marked = [p for group in rule.param_groups if group["embedding"] for p in group["params"]]
    ends = [trainer.model.get_input_embeddings().weight, trainer.model.get_output_embeddings().weight]
    assert {id(p) for p in marked} == {id(p) for p in ends}
    assert {"win_rate", "win_rate_embedding"} <= rule.metrics().keys()


def test_ekfac_at_its_defaults_corrects_what_kfac_would_do(make_trainer: Any) -> None:
    trainer = make_trainer(OPTIMIZERS.get("ekfac")(), max_steps=3)
    trainer.train()
    inverse = trainer.update_rule.preconditioner
    assert inverse.moments.keys() == trainer.update_rule.factors.layers.keys()
    for name, found in inverse.moments.items():
        own = torch.linalg.eigvalsh(inverse.factors.outputs(name)), torch.linalg.eigvalsh(inverse.factors.inputs(name))
        assert not torch.allclose(found, torch.outer(*own), rtol=0.01)
    with pytest.raises(ValueError, match=r"curvature\.interval must be 1 or more"):
        OPTIMIZERS.get("ekfac")(curvature=CurvatureSpec(interval=0))


class Watch(TrainerCallback):
    """Keeps what happens around a step."""

    def __init__(self, trainer: UnlearnTrainer) -> None:
        self.trainer = trainer
        self.clean: list[bool] = []
        self.gradients: list[torch.Tensor] = []
        trainer.add_callback(self)

    def _grads(self) -> list[Any]:
        return [p.grad for p in self.trainer.model.parameters()]  # pyright: ignore[reportOptionalMemberAccess]

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.clean.append(all(g is None for g in self._grads()))

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.gradients.append(torch.cat([g.flatten() for g in self._grads()]))


def test_a_pass_changes_nothing_but_the_rule(make_trainer: Any) -> None:
    """The model has dropout: the gradient of the step after a pass is the one it would have had, byte for byte."""
    seen = []
    for optimizer in (OPTIMIZERS.get("adamw")(), sophia(micro_batches=2)):
        trainer = make_trainer(optimizer, max_steps=1)
        watch = Watch(trainer)
        torch.manual_seed(5)
        trainer.train()
        seen.append(watch)
    assert seen[0].clean == seen[1].clean == [True]
    assert torch.equal(seen[0].gradients[0], seen[1].gradients[0])


@pytest.mark.parametrize(
    ("interval", "warm_start", "micro_batches", "expected"),
    [(3, 0, 1, {0: 1, 3: 1, 6: 1}), (0, 0, 2, {0: 2}), (4, 5, 2, {0: 5, 4: 2}), (0, 3, 1, {0: 3})],
)
def test_passes_come_when_they_are_due(
    make_trainer: Any, interval: int, warm_start: int, micro_batches: int, expected: dict[int, int]
) -> None:
    schedule = {"interval": interval, "warm_start": warm_start, "micro_batches": micro_batches, "cache": False}
    trainer = make_trainer(sophia(**schedule))
    count: dict[int, int] = {}
    inner = trainer._passes._micro_batch

    def counted(*args: Any, **more: Any) -> Any:
        count[trainer.state.global_step] = count.get(trainer.state.global_step, 0) + 1
        return inner(*args, **more)

    trainer._passes._micro_batch = counted
    trainer.train()
    assert count == expected
    (log,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, LogCallback)]
    timed = [r["step"] - 1 for r in log.records if "curvature_seconds" in r]
    assert timed == list(expected)
    assert all(0 < r["curvature_seconds"] < r["seconds"] for r in log.records if "curvature_seconds" in r)


def test_objective_squared_takes_in_what_the_optimizer_sees_at_every_step(make_trainer: Any) -> None:
    trainer = make_trainer(sophia(estimator="objective_squared"))
    watch, order = Watch(trainer), []
    rule = trainer.create_optimizer()
    for name in ("update_curvature", "step"):
        inner = getattr(rule, name)
        setattr(rule, name, lambda *args, name=name, inner=inner: (order.append(name), inner(*args))[1])
    trainer.train()
    assert trainer._passes is None
    assert order == ["update_curvature", "step"] * 8
    assert trainer.state.global_step == len(watch.gradients) == 8
    expected = torch.zeros_like(watch.gradients[0])
    for gradient in watch.gradients:
        assert float(gradient.norm()) < 1 + 1e-4  # clipped
        expected = 0.95 * expected + 0.05 * gradient**2
    params, state = list(trainer.model.parameters()), trainer.update_rule.state
    found = torch.cat([state[p]["curvature"].flatten() for p in params])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-16)


def test_settings_of_passes_are_refused_where_none_are_made() -> None:
    for name in ("sophia", "adamw_retain"):
        OPTIMIZERS.get(name)(curvature=CurvatureSpec(estimator="objective_squared"))
        spec = CurvatureSpec(estimator="objective_squared", source="forget", interval=7, warm_start=2, shuffled=True)
        ignored = ", ".join(f"curvature.{name}" for name in ("source", "interval", "warm_start", "shuffled"))
        with pytest.raises(ValueError, match=f"no passes: leave out {ignored}"):
            OPTIMIZERS.get(name)(curvature=spec)


def test_objective_squared_is_the_release_s_curvature(make_trainer: Any) -> None:
    """After one step, from the same weights, Sophia's and the released optimizer's state hold the same."""
    found = []
    for optimizer, slot in (
        (sophia(estimator="objective_squared"), "curvature"),
        (OPTIMIZERS.get("soul_release")(), "grad_sq"),
    ):
        trainer = make_trainer(optimizer, max_steps=1)
        torch.manual_seed(5)
        trainer.train()
        found.append(torch.cat([trainer.update_rule.state[p][slot].flatten() for p in trainer.model.parameters()]))
    assert found[0].max() > 0
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("source", "objective", "expected"),
    [
        ("retain", "grad_diff", ["retain"]),
        ("forget", "grad_diff", ["forget"]),
        ("retain+forget", "grad_diff", ["retain", "forget"]),
        ("retain", "ga", ["retain"]),  # which the objective itself never looks at
        ("forget", "ft", ["forget"]),
    ],
)
def test_sources(make_trainer: Any, source: Any, objective: str, expected: list[str]) -> None:
    trainer = make_trainer(sophia(source=source, general_text=2), objective=objective)
    data = trainer.unlearn_data
    rows = {
        row
        for name in expected
        for row in (data.template.encode(e, index=i) for i, e in enumerate(data.examples[name]))
    }
    assert set(trainer._passes.rows) == rows
    assert len(trainer._passes.rows) == len(rows)
    texts = [data.template.tokenizer.decode(row.input_ids) for row in trainer._passes.text]
    assert len(texts) == 24
    assert all(row.answer_start == 1 for row in trainer._passes.text)


def test_a_source_that_is_empty_is_an_error(make_trainer: Any) -> None:
    with pytest.raises(ValueError, match=r"no retain set: give data\.retain, or set optimizer\.curvature\.source"):
        make_trainer(sophia(), objective="ga", retain=[])
