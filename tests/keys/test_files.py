"""Key files, ours and the originals', and everything that is no key."""

from __future__ import annotations

import json
import os
import stat
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradsurgery as gs
from gradsurgery.errors import ArtefactError, KeyWarning, SelectionError
from tests.keys.cases import copy_of
from tests.keys.tiers import key_of
from tests.surgery.tiny import anatomy, build
from tests.transforms.cases import case

SWAPS = {"attn_heads": [[[1, 0], [0, 2]]], "mlp_cols": [[[0, 10], [1, 4]], [[1, 3], [0, 0]]]}


def written(path: Path, data: Any, mode: int = 0o600) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    path.chmod(mode)
    return path


class TestFiles:
    def test_the_originals_go_through_unchanged(self, tmp_path: Path) -> None:
        """Their lists and nothing else, in their order, whatever we know of the model."""
        key = gs.PermutationKey.load(written(tmp_path / "key.json", SWAPS))
        key.validate(anatomy("gpt_neo"))
        key.save(tmp_path / "again.json")
        assert json.loads((tmp_path / "again.json").read_text()) == SWAPS
        assert list(json.loads((tmp_path / "again.json").read_text())) == ["attn_heads", "mlp_cols"]

    def test_their_empty_lists_stay(self, tmp_path: Path) -> None:
        data = {"attn_heads": [], "mlp_cols": [[[0, 1], [1, 1]]]}
        gs.PermutationKey.load(written(tmp_path / "key.json", data)).save(tmp_path / "again.json")
        assert json.loads((tmp_path / "again.json").read_text()) == data

    def test_their_half_unit_lists(self, tmp_path: Path) -> None:
        data = {**SWAPS, "attn_out_heads": [[[0, 1], [1, 1]]], "mlp_up_cols": [[[0, 7], [1, 9]]], "mlp_down_cols": []}
        key = gs.PermutationKey.load(written(tmp_path / "key.json", data))
        assert len(key) == 5
        key.save(tmp_path / "again.json")
        assert json.loads((tmp_path / "again.json").read_text()) == {n: s for n, s in data.items() if s}

    @pytest.mark.parametrize("kind", ["gpt_neo", "llama"])
    def test_ours(self, kind: str, tmp_path: Path) -> None:
        key = key_of(kind)
        key.save(tmp_path / "folder" / "key.json")
        again = gs.PermutationKey.load(str(tmp_path / "folder" / "key.json"))
        assert again == key and again.model == key.model == anatomy(kind).fingerprint
        about = json.loads((tmp_path / "folder" / "key.json").read_text())["gradsurgery"]
        assert about == {"format": 1, "version": gs.__version__, "model": key.model, "key": key.fingerprint}

    def test_owner_only_whatever_the_umask(self, tmp_path: Path) -> None:
        path = tmp_path / "key.json"
        old = os.umask(0)
        try:
            key_of("gpt_neo").save(path)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            path.chmod(0o644)
            key_of("gpt_neo", seed=1).save(path)  # over one that others can read
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        finally:
            os.umask(old)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gs.PermutationKey.load(path)

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
    def test_readable_by_others(self, mode: int, tmp_path: Path) -> None:
        path = written(tmp_path / "key.json", SWAPS, mode)
        with pytest.warns(KeyWarning, match=r"can be read by others.*chmod 600") as caught:
            gs.PermutationKey.load(path)
        assert caught[0].filename == __file__

    @pytest.mark.parametrize("where", ["write_text", "replace"])
    def test_a_failed_save_leaves_the_old_file(
        self, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "key.json"
        key_of("gpt_neo").save(path)
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(Path if where == "write_text" else os, where, lambda *a, **k: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                key_of("gpt_neo", seed=1).save(path)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["key.json"]

    def test_what_is_no_key_is_not_saved(self, tmp_path: Path) -> None:
        with pytest.raises(SelectionError, match=r"mlp_cols\[0\] is \[\[0, 1\]\]"):
            gs.PermutationKey(mlp_cols=[[[0, 1]]]).save(tmp_path / "key.json")
        assert not list(tmp_path.iterdir())


class TestWhatIsNoKey:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"attn_heads": [[[0, 1], [1,', "is truncated or no JSON"),
            ("", "is truncated or no JSON"),
            ("\x00\x01", "is truncated or no JSON"),
            ("[]", "is no permutation key"),
            ("3", "is no permutation key"),
            ("null", "is no permutation key"),
            ("{}", "is no permutation key"),
            ('{"heads": []}', "is no permutation key"),
            ('{"mlp_cols": [], "mlp_rows": []}', "holds mlp_rows, which this version does not know"),
            ('{"mlp_cols": [], "gradsurgery": {"format": 2}}', "pip install --upgrade"),
            ('{"mlp_cols": [], "gradsurgery": 7}', "is not a permutation key of format 1"),
        ],
    )
    def test_files(self, text: str, message: str, tmp_path: Path) -> None:
        path = written(tmp_path / "key.json", text)
        with pytest.raises(ArtefactError, match=message) as caught:
            gs.PermutationKey.load(path)
        assert str(path) in str(caught.value)

    def test_missing_files(self, tmp_path: Path) -> None:
        with pytest.raises(ArtefactError, match="does not exist"):
            gs.PermutationKey.load(tmp_path / "nowhere.json")

    def test_binary_files(self, tmp_path: Path) -> None:
        (tmp_path / "key.json").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ArtefactError, match="truncated or no JSON"):
            gs.PermutationKey.load(tmp_path / "key.json")

    def test_truncated_anywhere(self, tmp_path: Path) -> None:
        key_of("gpt_neo").save(tmp_path / "key.json")
        text = (tmp_path / "key.json").read_text().rstrip()
        for stop in range(0, len(text), 41):
            with pytest.raises(ArtefactError):
                gs.PermutationKey.load(written(tmp_path / "cut.json", text[:stop]))

    def test_swaps_that_were_changed(self, tmp_path: Path) -> None:
        key_of("gpt_neo").save(tmp_path / "key.json")
        data = json.loads((tmp_path / "key.json").read_text())
        data["mlp_cols"][0][0][1] += 1
        with pytest.raises(ArtefactError, match="its swaps were changed"):
            gs.PermutationKey.load(written(tmp_path / "key.json", data))

    def test_another_order_is_no_change(self, tmp_path: Path) -> None:
        key_of("gpt_neo").save(tmp_path / "key.json")
        data = json.loads((tmp_path / "key.json").read_text())
        data["mlp_cols"] = [[b, a] for a, b in reversed(data["mlp_cols"])]
        assert gs.PermutationKey.load(written(tmp_path / "key.json", data)) == key_of("gpt_neo")


BAD: dict[str, tuple[Any, str]] = {
    "three slots": ([[[0, 0], [1, 0], [1, 1]]], r"mlp_cols\[0\] is .*; a swap is \[\[layer, i\], \[layer, j\]\]"),
    "one slot": ([[[0, 0]]], r"mlp_cols\[0\] is \[\[0, 0\]\];"),
    "no slots": ([[[0, 1], [1, 1]], []], r"mlp_cols\[1\] is \[\]"),
    "flat": ([0, 1, 2, 3], r"mlp_cols\[0\] is 0; a swap is"),
    "flat slots": ([[0, 1]], r"mlp_cols\[0\] is \[0, 1\]; a swap is"),
    "triples": ([[[0, 1, 2], [1, 1, 2]]], r"a swap is"),
    "text": ("mlp", r"mlp_cols is a list of swaps .*, not str"),
    "texts": ([["0", "1"]], r"a swap is"),
    "a dictionary": ({"0": 1}, r"mlp_cols is a list of swaps .*, not dict"),
    "none": (None, r"mlp_cols is a list of swaps .*, not NoneType"),
    "a number": (3, r"mlp_cols is a list of swaps .*, not int"),
    "an array": (np.array([[[0, 1], [1, 1]]]), r"mlp_cols is a list of swaps .*, not ndarray"),
    "a tensor": (torch.tensor([[[0, 1], [1, 1]]]), r"mlp_cols is a list of swaps .*, not Tensor"),
    "fractions": ([[[0, 1.5], [1, 1]]], r"whole numbers from 0 on, not 1.5"),
    "floats": ([[[0, 1.0], [1, 1]]], r"whole numbers from 0 on, not 1.0"),
    "bools": ([[[False, 1], [True, 1]]], r"whole numbers from 0 on, not False"),
    "digits": ([[[0, "1"], [1, 1]]], r"whole numbers from 0 on, not '1'"),
    "nothing": ([[[0, None], [1, 1]]], r"whole numbers from 0 on, not None"),
    "negative": ([[[0, -1], [1, 1]]], r"whole numbers from 0 on, not -1"),
    "negative layer": ([[[-1, 1], [1, 1]]], r"whole numbers from 0 on, not -1"),
    "layer": (
        [[[0, 1], [2, 1]]],
        r"mlp_cols\[0\] names neuron 1 of layer 2: layers 0-1 of GPTNeoForCausalLM have neurons 0-19",
    ),
    "index": ([[[0, 0], [1, 1]], [[0, 20], [1, 2]]], r"mlp_cols\[1\] names neuron 20 of layer 0"),
    "twice": ([[[0, 1], [1, 1]], [[1, 1], [0, 2]]], r"slot \[1, 1\] stands in mlp_cols\[0\] and mlp_cols\[1\]"),
    "itself": ([[[0, 1], [0, 1]]], r"slot \[0, 1\] stands in mlp_cols\[0\], twice"),
}


class TestBadSwaps:
    @pytest.mark.parametrize("name", BAD)
    def test_of_neurons(self, name: str) -> None:
        """Whatever looks at the key first says the same, and nothing has moved."""
        given, message = BAD[name]
        key, model = gs.PermutationKey(mlp_cols=given), build("gpt_neo")
        before = {n: p.clone() for n, p in model.named_parameters()}
        uses: list[Any] = [
            lambda: key.validate(anatomy("gpt_neo")),
            lambda: key.region(anatomy("gpt_neo")),
            lambda: key.entropy_bits(anatomy("gpt_neo")),
            lambda: key.apply_(model, anatomy=anatomy("gpt_neo")),
            lambda: gs.methods.tiered(key, anatomy("gpt_neo")),
            lambda: gs.methods.private_finetune(key, anatomy("gpt_neo")),
        ]
        for use in uses:
            with pytest.raises(SelectionError, match=message):
                use()
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())

    @pytest.mark.parametrize("name", BAD)
    def test_keys_that_make_no_sense_can_be_looked_at(self, name: str) -> None:
        key = gs.PermutationKey(mlp_cols=BAD[name][0])
        try:
            text = repr(key)
        except SelectionError:
            return
        assert text.startswith("PermutationKey(")

    @pytest.mark.parametrize("name", [n for n in BAD if n not in ("layer", "index", "twice", "itself")])
    def test_whatever_else_one_does_with_them(self, name: str, tmp_path: Path) -> None:
        key, good = gs.PermutationKey(mlp_cols=BAD[name][0]), gs.PermutationKey(mlp_cols=[[[0, 0], [1, 0]]])
        uses: list[Any] = [
            lambda: key.save(tmp_path / "key.json"),
            lambda: key.fingerprint,
            lambda: hash(key),
            lambda: gs.PermutationKey.compose(good, key),
            lambda: key.subset(0.5, seed=0),
            lambda: len(key),
        ]
        for use in uses:
            with pytest.raises(SelectionError, match="mlp_cols"):
                use()

    @pytest.mark.parametrize("list_", ["attn_heads", "experts", "attn_out_heads", "mlp_up_cols", "mlp_down_cols"])
    def test_of_other_lists(self, list_: str) -> None:
        for given, message in (
            ([[[0, 99], [1, 0]]], "names"),
            ([[[0, 0.5], [1, 0]]], "whole numbers"),
            ([[0]], "a swap is"),
        ):
            with pytest.raises(SelectionError, match=rf"{list_}\[0\].*{message}"):
                gs.PermutationKey(**dict[str, Any]({list_: given})).validate(case("mixtral").anatomy)

    def test_units_that_a_model_does_not_have(self) -> None:
        with pytest.raises(SelectionError, match="GPTNeoForCausalLM has no experts"):
            gs.PermutationKey(experts=[[[0, 0], [1, 0]]]).validate(anatomy("gpt_neo"))
        with pytest.raises(SelectionError, match="Mamba2ForCausalLM has no neurons"):
            gs.PermutationKey(mlp_cols=[[[0, 0], [1, 0]]]).validate(case("mamba2").anatomy)

    def test_kv_groups_are_counted_where_heads_share(self) -> None:
        found = case("llama").anatomy  # 6 heads on 3 KV heads
        gs.PermutationKey(attn_heads=[[[0, 2], [1, 0]]]).validate(found)
        with pytest.raises(SelectionError, match=r"have KV groups 0-2"):
            gs.PermutationKey(attn_heads=[[[0, 3], [1, 0]]]).validate(found)

    def test_slots_named_by_two_lists(self) -> None:
        whole, half = [[[0, 1], [1, 1]]], [[[0, 1], [1, 2]]]
        for lists in ({"mlp_cols": whole, "mlp_up_cols": half}, {"mlp_cols": whole, "mlp_down_cols": half}):
            with pytest.raises(SelectionError, match=r"slot \[0, 1\] stands in mlp_cols\[0\] and mlp_"):
                gs.PermutationKey(**dict[str, Any](lists)).validate(anatomy("gpt_neo"))
        with pytest.raises(SelectionError, match=r"attn_heads\[0\] and attn_out_heads\[0\]"):
            gs.PermutationKey(attn_heads=whole, attn_out_heads=half).validate(anatomy("gpt_neo"))
        gs.PermutationKey(mlp_up_cols=whole, mlp_down_cols=half).validate(anatomy("gpt_neo"))

    def test_an_expert_and_neurons_inside_it(self) -> None:
        found = case("mixtral").anatomy
        with pytest.raises(SelectionError, match="names parts of one unit twice"):
            gs.PermutationKey(experts=[[[0, 1], [1, 2]]], mlp_cols=[[[0, 13 + 4], [2, 0]]]).validate(found)
        gs.PermutationKey(experts=[[[0, 1], [1, 2]]], mlp_cols=[[[0, 3 * 13], [2, 0]]]).validate(found)

    def test_units_of_other_shapes(self) -> None:
        found = case("bart").anatomy  # four heads a layer in the encoder, then five and five in the decoder
        gs.PermutationKey(attn_heads=[[[0, 4], [0, 12]], [[0, 0], [1, 3]]]).validate(found)
        with pytest.raises(SelectionError, match=r"attn_heads swaps .* whose units have other shapes: \[10, 40\]"):
            gs.PermutationKey(attn_heads=[[[0, 0], [0, 6]]]).validate(found)


class TestOtherModels:
    def test_a_key_of_another_model(self) -> None:
        key = key_of("gpt_neo")
        with pytest.raises(
            ArtefactError, match=rf"{key.fingerprint}\) was made for a model with fingerprint {key.model}"
        ):
            key.validate(anatomy("llama"))
        with pytest.raises(ArtefactError, match="for_any_model"):
            key.apply_(build("llama"))
        with pytest.raises(ArtefactError):
            gs.methods.tiered(key, anatomy("llama"))
        gs.PermutationKey(mlp_cols=key.mlp_cols).validate(anatomy("llama"))

    def test_windows(self) -> None:
        """Allowed, and said once."""
        model = build("gpt_neo")
        with pytest.warns(KeyWarning, match=r"1 of 1 swaps of heads join layers with different attention_layers"):
            gs.PermutationKey(attn_heads=[[[0, 0], [1, 1]]]).apply_(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gs.PermutationKey(mlp_cols=[[[0, 0], [1, 1]]]).apply_(model)

    def test_sliding_windows(self) -> None:
        model = copy_of("gpt_oss")
        assert model.config.layer_types[:2] == ["sliding_attention", "full_attention"]
        with pytest.warns(KeyWarning, match="different layer_types"):
            gs.PermutationKey(attn_heads=[[[0, 0], [1, 1]]]).apply_(model)

    def test_alibi(self) -> None:
        model = copy_of("bloom")
        with pytest.warns(KeyWarning, match="slope of its new place"):
            gs.PermutationKey(attn_heads=[[[0, 0], [1, 1]]]).apply_(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gs.PermutationKey(mlp_cols=[[[0, 0], [1, 1]]]).apply_(copy_of("bloom"))

    def test_alibi_heads_of_one_index_are_alike(self) -> None:
        """Head 2 of a layer has the slope of head 2 of any other."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gs.PermutationKey(attn_heads=[[[0, 2], [1, 2]]]).apply_(copy_of("bloom"))
