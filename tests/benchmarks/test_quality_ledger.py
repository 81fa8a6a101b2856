"""What the quality benchmark writes down, and that an interrupted one goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.quality import main as quality
from benchmarks.quality.ledger import Key, Ledger
from benchmarks.quality.policies import METHODS, POLICIES
from benchmarks.quality.rows import Frames
from benchmarks.quality.scores import ClipScore
from lightforcing_ref.attention import block_means
from lightforcing_ref.config import PRESETS
from training.data.clips import all_clips

KEY = Key("hsa", "a1", "d0", "a red circle on black moves left from the right", 0, 7)
SCORE = ClipScore(
    KEY.caption, 0, True, True, True, False, True, True, 2.5, 0.75, (1.0, 0.0), None, psnr=21.5, ssim=0.9
)


def test_a_clip_is_known_again_by_everything_it_depends_on(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    frames = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    ledger.keep(KEY, frames)
    ledger.add(KEY, SCORE, 0.125)
    again = Ledger(tmp_path)
    assert again.score(KEY) == SCORE
    assert again.share("hsa", "a1") == 0.125
    kept = again.frames(KEY)
    assert kept is not None and np.array_equal(kept, frames)
    for change in ({"identity": "a2"}, {"dense": "d1"}, {"seed": 1}, {"chunks": 3}, {"caption": "another"}):
        assert again.score(replace(KEY, **change)) is None
    assert again.share("hsa", "a2") is None


def test_a_line_that_was_cut_off_is_made_anew(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.add(KEY, SCORE, None)
    ledger.add(replace(KEY, seed=1), SCORE, None)
    lines = tmp_path / "clips.jsonl"
    lines.write_bytes(lines.read_bytes()[:-9])
    again = Ledger(tmp_path)
    assert again.score(KEY) == SCORE and again.score(replace(KEY, seed=1)) is None
    again.add(replace(KEY, seed=1), SCORE, None)
    assert Ledger(tmp_path).score(replace(KEY, seed=1)) == SCORE


class Stub:
    """A row whose clips cost nothing; after `limit` of them it is interrupted."""

    share = 0.5

    def __init__(self, name: str, made: list[tuple[str, str]], limit: int) -> None:
        self.name, self.identity, self.made, self.limit = name, f"{name}-weights", made, limit

    def generate(self, prompt: str, seed: int, chunks: int) -> Frames:
        if len(self.made) == self.limit:
            raise KeyboardInterrupt
        self.made.append((self.name, prompt))
        clip = next(clip for clip in all_clips() if clip.caption == prompt)
        return clip.render()


def test_an_interrupted_benchmark_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, str]] = []

    def rows(limit: int) -> None:
        monkeypatch.setattr(
            quality, "_rows", lambda _: [Stub(name, made, limit) for name in ("dense", "other")]
        )

    arguments = ["--prompts", "2", "--kinds", "moves", "--out", str(tmp_path)]
    rows(limit=3)
    with pytest.raises(KeyboardInterrupt):
        quality.main(arguments)
    rows(limit=100)
    assert quality.main(arguments) == 0
    assert len(made) == len(set(made)) == 4
    assert quality.main(arguments) == 0
    assert len(made) == 4
    content = json.loads((tmp_path / "quality.json").read_text())
    assert {name: row["summary"]["clips"] for name, row in content["rows"].items()} == {
        "dense": 2,
        "other": 2,
    }
    assert content["rows"]["other"]["summary"]["seen"] == 0.5
    assert content["rows"]["other"]["summary"]["psnr"] == 99
    assert quality.main([*arguments, "--against", "other"]) == 0
    content = json.loads((tmp_path / "quality.json").read_text())
    assert content["rows"]["other"]["summary"]["psnr"] is None
    assert content["rows"]["dense"]["summary"]["psnr"] == 99
    assert len(made) == 4  # frames were kept
    for name in ("quality.md", "quality.png", "contact_sheet.png"):
        assert (tmp_path / name).stat().st_size > 0


def share(name: str, chunk: int) -> float:
    """The share of the keys that a policy sees of random tokens, mean over the layers."""
    preset = PRESETS["tiny"]
    geometry, heads = preset.geometry(), preset.dit.heads
    tokens, past = geometry.frame_tokens, 3 * chunk
    generator = torch.Generator().manual_seed(chunk)
    k, v = torch.randn(2, past + 3, tokens, heads, preset.dit.head_dim, generator=generator)
    q = torch.randn(3 * tokens, heads, preset.dit.head_dim, generator=generator)
    means = block_means(k.flatten(0, 1), tokens, geometry.block_k)
    policy, shares = POLICIES[name], []
    for operator in policy.attend(preset):
        operator.counting = True
        operator(
            q, k[past:].flatten(0, 1), v[past:].flatten(0, 1), block_means(q, tokens, geometry.block_q), means[past:],
            k[:past], v[:past], means[:past], torch.arange(past, dtype=torch.int32), chunk,
            frame_tokens=tokens, block_q=geometry.block_q, block_k=geometry.block_k,
            keep_frames=policy.hsa.keep_frames, sink_frames=policy.hsa.sink_frames,
            near_frames=policy.hsa.near_frames, scale=0.125, keep_q20=policy.keep_q20(preset),
        )  # fmt: skip
        shares += operator.shares
    return sum(shares) / len(shares)


def test_the_methods_of_one_budget_see_about_the_same() -> None:
    """Over a clip; `radial` has a rule of its own, and `pbsa` sees its persistent set besides."""
    frames = [3 * (chunk + 1) for chunk in range(1, 7)]

    def over_clip(name: str) -> float:
        return sum(n * share(name, chunk) for n, chunk in zip(frames, range(1, 7), strict=True)) / sum(frames)

    assert over_clip("dense") == 1
    budget = over_clip("hsa")
    assert 0.09 < budget < 0.14
    for name in METHODS:
        if name not in ("radial", "pbsa"):
            assert over_clip(name) == pytest.approx(budget, abs=0.035), name
    assert budget < over_clip("pbsa") < 2 * budget


def test_policies_all_are_the_methods_behind_dense(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(METHODS) <= set(POLICIES)
    options = quality._parser().parse_args(["--policies", "all"])
    assert [row.name for row in quality._rows(options)] == ["dense", *METHODS]
    assert quality.main(["--policies", "best"]) == 2
    assert "unknown policy or schedule 'best'" in capsys.readouterr().err
    assert quality.main(["--rows", "dense", "--trained", "framewise"]) == 2
    assert "expected NAME=FILE:ROWS" in capsys.readouterr().err
