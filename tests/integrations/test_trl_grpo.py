"""GRPO on TRL: flags follow their rollouts, the quarantine stays out of generation, an empty method changes no bit."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery.adapters import Adapter, Quantile, Score
from gradsurgery.errors import BatchError, PlanError
from gradsurgery.runs.quarantine_grpo_rows import sums_tokenizer
from gradsurgery.surgery import Method, Pass
from gradsurgery.surgery.surgery import attached_to
from tests.adapters.tiny import grads, stir

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from gradsurgery.integrations.trl_flags import RolloutFlags  # noqa: E402
from gradsurgery.integrations.trl_grpo import GRPOTrainer, SurgeryGRPOTrainer  # noqa: E402

torch.set_num_threads(1)
TOKENIZER = sums_tokenizer(["ok"])
PROMPTS = [f"{a}+{b}=" if b % 2 else f"{a}>{b}?" for a in (1, 7, 12, 38) for b in range(8)]
SLOW = settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])


def model_of(seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=len(TOKENIZER), max_position_embeddings=32, **sizes, **special, **more)
    )


def adapted(seed: int = 0, **options: Any) -> Adapter:
    """A policy with both parts at work."""
    return stir(gs.adapters.add(model_of(seed), **{"modules": "all-linear", "rank": 3, **options}), 0.2)


def arguments(out: Path, **more: Any) -> Any:
    given: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "max_completion_length": 4,
        "loss_type": "dr_grpo",
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return trl.GRPOConfig(str(out), **{**given, **more})


def length_reward(completions: list[str], **_: Any) -> list[float]:
    """Depends on the whole completion, so that advantages differ."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


def parity(prompts: list[str], completions: list[str], **_: Any) -> list[bool]:
    return [parity_of(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]


def parity_of(prompt: str, completion: str) -> bool:
    return sum(map(ord, prompt + completion)) % 3 == 0


def data(**columns: list[Any]) -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS, **columns})


class Recording(SurgeryGRPOTrainer):
    """Keeps what each micro-batch was trained on, and the gradients that it left."""

    change: Callable[[dict[str, Any]], dict[str, Any]] = staticmethod(lambda inputs: inputs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs = type(self).change(dict(inputs))
        self.__dict__.setdefault("seen", []).append(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        out = super().training_step(*args, **kwargs)
        kept = self._adapter
        if kept is not None:
            self.__dict__.setdefault("gradients", []).append((grads(kept, "kept"), grads(kept, "quarantine")))
        return out


def trainer(adapter: Any, args: Any, method: Method, cls: Any = Recording, **more: Any) -> Any:
    given: dict[str, Any] = {"reward_funcs": length_reward, "train_dataset": data(), **more}
    return cls(adapter.host, args=args, processing_class=TOKENIZER, method=method, **given)


def texts(ids: Tensor, mask: Tensor) -> list[str]:
    return [TOKENIZER.decode(row[keep.bool()], skip_special_tokens=True) for row, keep in zip(ids, mask, strict=True)]


def test_the_library_does_not_import_trl() -> None:
    code = "import sys, gradsurgery; assert not {'trl', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@SLOW
@given(st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.integers(0, 99), st.booleans())
def test_flags_follow_their_rollouts(
    tmp_path_factory: Any, accumulation: int, generation: int, iterations: int, seed: int, shuffle: bool
) -> None:
    """From all three sources, whatever order TRL trains rollouts in: each micro-batch is recomputed from its tokens."""

    def telling(prompts: list[str], completions: list[str], log_extra: Any, **_: Any) -> list[float]:
        log_extra("told", [not parity_of(p, c) for p, c in zip(prompts, completions, strict=True)])
        return length_reward(completions)

    adapter = adapted()
    under = [gs.mask(adapter.kept, where=name) for name in ("asked", "told", "column")]
    args = arguments(
        tmp_path_factory.mktemp("flags"),
        gradient_accumulation_steps=accumulation,
        steps_per_generation=generation,
        num_iterations=iterations,
        shuffle_dataset=shuffle,
        seed=seed,
        max_steps=3,
    )
    rows = data(column=[len(p) % 2 == 0 for p in PROMPTS])
    made = trainer(adapter, args, Method([Pass("p", under=under)]), reward_funcs=telling, train_dataset=rows,
                   flags={"asked": parity})  # fmt: skip
    made.train()
    assert len(made.seen) == 3 * accumulation
    for batch in made.seen:
        prompts = texts(batch["prompt_ids"], batch["prompt_mask"])
        written = texts(batch["completion_ids"], batch["completion_mask"])
        expected = [parity_of(p, c) for p, c in zip(prompts, written, strict=True)]
        assert batch["asked"].tolist() == expected
        assert batch["told"].tolist() == [not flag for flag in expected]
        assert batch["column"].tolist() == [len(p) % 2 == 0 for p in prompts]


@SLOW
@given(st.sampled_from(["route", "absorb"]), st.integers(0, 99), st.floats(-50, 50), st.sampled_from([1, 2]))
def test_flagged_rollouts_do_not_touch_what_others_teach(
    tmp_path_factory: Any, mode: Any, seed: int, factor: float, accumulation: int
) -> None:
    """Whatever the advantage of flagged rollouts, the kept part's gradient has the same bits."""

    def run(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
        adapter = adapted(seed)
        args = arguments(
            tmp_path_factory.mktemp("bleed"), max_steps=1, seed=seed, gradient_accumulation_steps=accumulation
        )
        method = gs.methods.quarantine(adapter, mode, where="flag")
        made = trainer(adapter, args, method, type("One", (Recording,), {"change": staticmethod(change)}),
                       flags={"flag": parity})  # fmt: skip
        made.train()
        return made

    def louder(inputs: dict[str, Any]) -> dict[str, Any]:
        advantages = inputs["advantages"]
        return {**inputs, "advantages": torch.where(inputs["flag"], advantages * factor + factor, advantages)}

    plain, loud = run(lambda inputs: inputs), run(louder)
    for (kept, _), (again, _) in zip(plain.gradients, loud.gradients, strict=True):
        assert all(torch.equal(kept[name], again[name]) for name in kept)
    flagged = torch.cat([batch["flag"] for batch in plain.seen])
    moved = any(bool(g.any()) for g in plain.gradients[-1][0].values())
    assert moved or bool(flagged.all())


def test_unflagged_rollouts_teach_what_they_teach_alone(tmp_path: Path) -> None:
    """The routed gradient of the kept part against a loss over the unflagged rows alone, without any routing."""
    adapter = adapted()
    method = gs.methods.quarantine(adapter, "route", where="flag")
    made = trainer(adapter, arguments(tmp_path, max_steps=1), method, flags={"flag": parity})
    before = copy.deepcopy(adapter.state_dict())
    made.train()
    (batch,), (found, _) = made.seen, made.gradients[0]
    alone = ~batch["flag"]
    assert 0 < int(alone.sum()) < len(alone)
    adapter.load_state_dict(before)
    adapter.host.zero_grad()
    rows = {k: v[alone] if isinstance(v, Tensor) and v.dim() else v for k, v in batch.items()}
    share = float(alone.float().mean())
    (GRPOTrainer.compute_loss(made, adapter.host, rows) * share).backward()
    expected = grads(adapter, "kept")
    largest = max(float(g.abs().max()) for g in expected.values())
    worst = max(float((expected[n] - found[n]).abs().max()) for n in expected)
    assert largest > 0 and worst <= 1e-5 * largest  # rows in another batch: the rounding of fp32 sums


@pytest.mark.parametrize("mode", ["route", "absorb"])
def test_checkpointing_computes_again_under_the_same_flags(tmp_path: Path, mode: Any) -> None:
    found = []
    for checkpointing in (False, True):
        adapter = adapted()
        more = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if checkpointing else {}
        args = arguments(tmp_path, max_steps=1, gradient_checkpointing=checkpointing, **more)
        made = trainer(adapter, args, gs.methods.quarantine(adapter, mode), flags={"flag": parity})
        made.train()
        found.append(made.gradients[0])
    for plain, again in zip(*found, strict=True):
        assert all(torch.equal(plain[name], again[name]) for name in plain) and any(g.any() for g in plain.values())


@pytest.mark.parametrize("mode", ["route", "absorb"])
def test_generation_runs_without_the_quarantine(tmp_path: Path, mode: Any) -> None:
    """Counted: the quarantine computes in training forwards alone; log-probabilities of rollouts are without it."""
    adapter = adapted()
    calls: list[str] = []
    where = ["train"]
    for part in adapter.parts.values():
        quarantine: Any = part.quarantine
        quarantine.register_forward_hook(lambda *_: calls.append(where[0]))
    made = trainer(adapter, arguments(tmp_path, num_iterations=2, max_steps=4, beta=0.1),
                   gs.methods.quarantine(adapter, mode, where="flag"), flags={"flag": parity})  # fmt: skip
    outer = made._generate_and_score_completions

    def marked(inputs: Any) -> Any:
        where[0] = "rollouts"
        out = outer(inputs)
        with torch.no_grad(), adapter.without("quarantine"):
            expected = scored(made, out)
        with torch.no_grad(), adapter.without("quarantine", "kept"):
            base = scored(made, out)
        where[0] = "train"
        assert torch.allclose(out["old_per_token_logps"], expected, atol=1e-5)
        assert torch.allclose(out["ref_per_token_logps"], base, atol=1e-5)
        assert not torch.allclose(base, expected, atol=1e-3)
        return out

    made._generate_and_score_completions = marked
    made.train()
    assert set(calls) == {"train"} and len(calls) == 4 * len(adapter.parts)
    assert not isinstance(made.ref_model, nn.Module)  # no copy of the model
    assert "generate" not in adapter.host.__dict__ and attached_to(adapter.host) is None
    assert any("kl" in line for line in made.state.log_history)


def scored(made: Any, out: dict[str, Any]) -> Tensor:
    """Log-probabilities of the completions, from the logits."""
    ids = torch.cat([out["prompt_ids"], out["completion_ids"]], 1)
    mask = torch.cat([out["prompt_mask"], out["completion_mask"]], 1)
    logits = made.model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    found = logits[:, :-1].gather(-1, ids[:, 1:, None])[..., 0][:, -out["completion_ids"].shape[1] :]
    return found.masked_fill(out["completion_mask"] == 0, 0.0)


def test_evaluation_needs_no_flags_and_no_quarantine(tmp_path: Path) -> None:
    adapter = adapted()
    calls: list[bool] = []
    for part in adapter.parts.values():
        quarantine: Any = part.quarantine
        quarantine.register_forward_hook(lambda *_: calls.append(True))
    made = trainer(adapter, arguments(tmp_path, per_device_eval_batch_size=4), gs.methods.quarantine(adapter),
                   train_dataset=data(flag=[True] * len(PROMPTS)), eval_dataset=data().select(range(4)))  # fmt: skip
    found = made.evaluate()
    assert found["eval_loss"] == found["eval_loss"] and not calls


@pytest.mark.parametrize(
    "more", [{}, {"gradient_accumulation_steps": 2}, {"num_iterations": 2, "steps_per_generation": 2}]
)
def test_an_empty_method_changes_no_bit(tmp_path: Path, more: dict[str, Any]) -> None:
    found = []
    ours: dict[str, Any] = {"method": Method([Pass("policy")])}
    for cls, extra in ((trl.GRPOTrainer, {}), (SurgeryGRPOTrainer, ours)):
        model = model_of()
        args = arguments(tmp_path, max_steps=4, max_grad_norm=0.01, **more)
        made = cls(model, reward_funcs=length_reward, args=args, processing_class=TOKENIZER, train_dataset=data(),
                   **extra)  # fmt: skip
        made.train()
        found.append((model.state_dict(), [line.get("grad_norm") for line in made.state.log_history]))
    (plain, norms), (weights, again) = found
    assert all(torch.equal(plain[name], weights[name]) for name in plain) and norms == again
    assert any(not torch.equal(plain[name], value) for name, value in model_of().state_dict().items())


@pytest.mark.parametrize(("flag", "learns"), [(True, False), (False, True)])
def test_all_and_none_flagged(tmp_path: Path, flag: bool, learns: bool) -> None:
    adapter = adapted()
    before = copy.deepcopy(adapter.state_dict())
    made = trainer(adapter, arguments(tmp_path, max_steps=3), gs.methods.quarantine(adapter),
                   train_dataset=data(flag=[flag] * len(PROMPTS)))  # fmt: skip
    made.train()
    after = adapter.state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert any("kept" in name for name in moved) == learns and any("quarantine" in name for name in moved)
    assert made.state.log_history[0]["flagged/flag"] == float(flag)


def test_two_ranks_route_their_own_rollouts_and_stay_equal(tmp_path: Path) -> None:
    """See `tests.integrations.grpo_ranks`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += ["-m", "tests.integrations.grpo_ranks", str(tmp_path)]
    found = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0 and found.stdout.count("ranks agree") == 2, found.stderr[-3000:]


@pytest.mark.parametrize("mode", ["route", "absorb"])
@pytest.mark.parametrize("by", ["sequence", "rollout"])
def test_scores_decide_before_the_backward(tmp_path: Path, mode: Any, by: Any) -> None:
    """A threshold below every cosine flags all rollouts with a gradient, which then teach the kept part nothing."""
    adapter = adapted()
    ids = torch.randint(2, len(TOKENIZER), (4, 6), generator=torch.Generator().manual_seed(0))
    pairs = [({"input_ids": a[None], "labels": a[None]}, {"input_ids": b[None], "labels": b[None]})
             for a, b in zip(ids[:2], ids[2:], strict=True)]  # fmt: skip
    direction = gs.estimators.paired_direction(adapter.model, adapter, pairs, noise="keep")
    for threshold, flags in ((-1.0, True), (Quantile(0.5), None)):
        score = Score(direction, threshold, by=by)
        made = trainer(adapter, arguments(tmp_path, max_steps=2), gs.methods.quarantine(adapter, mode, None, score))
        made.train()
        touched = [any(bool(g.any()) for g in kept.values()) for kept, _ in made.gradients]
        assert not any(touched) if flags else any(touched)
        assert any("quarantine/flagged" in line for line in made.state.log_history)


def test_peft_adapters_take_part(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    wanted = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model_of(), wanted, adapter_name="default")
    model.add_adapter("waste", wanted)
    adapter = gs.adapters.from_peft(model, kept="default", quarantine="waste")
    made = trainer(adapter, arguments(tmp_path, beta=0.1), gs.methods.quarantine(adapter), flags={"flag": parity})
    made.train()
    assert any("kl" in line for line in made.state.log_history) and made.state.global_step == 2


def test_checkpoints_hold_the_surgery_and_resume(tmp_path: Path) -> None:
    adapter = stir(gs.adapters.add(model_of(tie_word_embeddings=True), rank=3))
    more = {"save_strategy": "steps", "save_steps": 2}
    for steps in (2, 4):
        made = trainer(adapter, arguments(tmp_path, max_steps=steps, **more), gs.methods.quarantine(adapter),
                       flags={"flag": parity})  # fmt: skip
        made.train(resume_from_checkpoint=steps > 2)
    assert (tmp_path / "checkpoint-4" / "surgery.json").is_file() and made.state.global_step == 4
    assert len(made.seen) == 2


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")  # TRL may change it
def test_rollouts_of_a_teacher_bring_their_column(tmp_path: Path) -> None:
    """What a rollout function adds to its rows is a column like any other."""

    def rollouts(prompts: list[str], made: Any) -> dict[str, Any]:
        ids = TOKENIZER(prompts)["input_ids"]
        taught = [k % 3 == 0 for k in range(len(prompts))]
        return {"prompt_ids": ids, "completion_ids": [[17 if t else 3, 1] for t in taught], "logprobs": None,
                "teacher": taught}  # fmt: skip

    adapter = adapted()
    made = trainer(adapter, arguments(tmp_path), gs.methods.quarantine(adapter, where="teacher"),
                   rollout_func=rollouts)  # fmt: skip
    made.train()
    for batch in made.seen:
        assert torch.equal(batch["teacher"], batch["completion_ids"][:, 0] == 17)


@pytest.mark.parametrize("scored", [False, True])
def test_kinds_of_rollouts_are_told_apart(tmp_path: Path, scored: bool) -> None:
    """Against means over the recorded rows of the step."""

    def telling(completions: list[str], log_extra: Any, **_: Any) -> list[float]:
        log_extra("kind", [sum(map(ord, text)) % 2 for text in completions])
        return length_reward(completions)

    adapter = adapted()
    score = None
    if scored:
        ids = torch.arange(2, 14).reshape(4, 3)
        sides = [{"input_ids": row[None], "labels": row[None]} for row in ids]
        direction = gs.estimators.paired_direction(
            adapter.model, adapter, [(sides[0], sides[1]), (sides[2], sides[3])], noise="keep"
        )
        score = Score(direction, 0.0)
    kinds = gs.adapters.Kinds("kind", ("even", "odd"))
    method = gs.methods.quarantine(adapter, where="flag", score=score, kinds=kinds)
    made = trainer(adapter, arguments(tmp_path), method, reward_funcs=telling, flags={"flag": parity})
    made.train()
    for batch, line in zip(made.seen, made.state.log_history, strict=False):
        for kind, name in enumerate(kinds.names or ()):
            mine = batch["kind"] == kind
            if not bool(mine.any()):
                continue
            if not scored:
                assert line[f"quarantine/flagged/{name}"] == pytest.approx(float(batch["flag"][mine].float().mean()))
            else:
                assert abs(line[f"quarantine/score/{name}"]) <= 1
            kept = batch["old_per_token_logps"][mine][batch["completion_mask"][mine].bool()]
            assert line[f"quarantine/log_probability/{name}"] == pytest.approx(float(kept.mean()), rel=1e-5)


def some_reward(value: float | None) -> Any:
    def reward(completions: list[str], **_: Any) -> list[float | None]:
        return [value if k % 2 else 1.0 * k for k in range(len(completions))]

    return reward


@pytest.mark.parametrize("value", [None, float("nan")])
def test_single_rollouts_without_a_reward_teach_nothing(tmp_path: Path, value: float | None) -> None:
    adapter = adapted()
    made = trainer(adapter, arguments(tmp_path), gs.methods.quarantine(adapter), flags={"flag": parity},
                   reward_funcs=some_reward(value))  # fmt: skip
    made.train()
    assert all(int((batch["advantages"] == 0).sum()) >= 4 for batch in made.seen)
    assert all(bool(p.isfinite().all()) for p in adapter.parameters())


def broken(error: type[Exception], match: str, **more: Any) -> Any:
    return pytest.param(more, error, match, id=match[:24])


@pytest.mark.parametrize(
    ("more", "error", "match"),
    [
        broken(BatchError, "nobody said which rollouts"),
        broken(BatchError, "nobody said what kind", flags={"flag": parity}, kinds=gs.adapters.Kinds("kind")),
        broken(BatchError, "every reward of this generation batch",
               flags={"flag": parity}, reward_funcs=lambda completions, **_: [None] * len(completions)),
        broken(BatchError, "returned -inf", flags={"flag": parity}, reward_funcs=some_reward(-float("inf"))),
        broken(BatchError, "3 flags for 8 rollouts", flags={"flag": lambda **_: [True] * 3}),
        broken(BatchError, "not by 0.5", flags={"flag": lambda completions, **_: [0.5] * len(completions)}),
    ],
)  # fmt: skip
def test_what_is_wrong_with_rollouts_is_said(
    tmp_path: Path, more: dict[str, Any], error: type[Exception], match: str
) -> None:
    adapter = adapted()
    method = gs.methods.quarantine(adapter, kinds=more.pop("kinds", None))
    made = trainer(adapter, arguments(tmp_path), method, **more)
    with pytest.raises(error, match=match):
        made.train()
    assert attached_to(adapter.host) is None and adapter.active == ("kept", "quarantine")


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"use_vllm": True}, "vLLM"),
        ({"sync_ref_model": True, "beta": 0.1}, "sync_ref_model"),
        ({"modules": ["q_proj", "lm_head"]}, "never calls it"),
        ({"method": Method([Pass("a"), Pass("b")])}, "one pass"),
        ({"method": Method([Pass("a", weight=2.0)])}, "a weight"),
        ({"method": "policy"}, "takes method"),
        ({"flags": {"other": parity}}, "does not read"),
        ({"flags": {"flag": 3}}, "name of a column"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, how: dict[str, Any], match: str) -> None:
    adapter = adapted(modules=how.pop("modules", "all-linear"))
    method = how.pop("method", None) or gs.methods.quarantine(adapter)
    flags = {"flags": how.pop("flags")} if "flags" in how else {}
    args = arguments(tmp_path)
    for name, value in how.items():
        setattr(args, name, value)
    with pytest.raises(PlanError, match=match):
        trainer(adapter, args, method, **flags)


def test_detectors_need_a_reward_function_to_stand_beside() -> None:
    with pytest.raises(PlanError, match="none but models"):
        RolloutFlags(["flag"], {"flag": parity}).heard([nn.Linear(1, 1)])


def test_trl_still_has_what_is_overridden() -> None:
    """The one private name: where rollouts become a batch, before `_prepare_inputs` shuffles and cuts it."""
    import inspect

    source = inspect.getsource(GRPOTrainer._prepare_inputs)
    assert source.index("_generate_and_score_completions") < source.index("shuffle_sequence_dict")
    assert "self.num_iterations" in inspect.getsource(GRPOTrainer._generate_and_score_completions)
