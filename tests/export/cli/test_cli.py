"""The command line: what is refused at the door and how, and every command end to end on a tiny bundle."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from export.cli.arguments import build_request
from export.cli.build import _next_commands
from export.cli.main import COMMANDS, _parser, _portable, main
from export.cli.onnx import graph_request
from export.machine import importable
from lightforcing_ref.checkpoint.lora import MergedLoRA
from lightforcing_ref.dimensions import TINY_VAE
from lightforcing_ref.shipped import shipped

ROOT = Path(__file__).resolve().parents[3]


RTX = pytest.mark.skipif(not importable("tensorrt_rtx"), reason="TensorRT-RTX is not installed")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must be refused; returns its error line."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ("--gpu rtx509", ("unknown target 'rtx509'", "did you mean rtx5090", "cpu", "h200")),
        ("--gpu nowhere/mine.toml", ("no target file at nowhere/mine.toml",)),
        ("--preset huge", ("unknown preset 'huge'", "tiny", "wan-1.3b")),
        (
            "--variant sparse",
            ("unknown variant 'sparse'", "dense, hopper, infinite, long, longlive, rolling, short"),
        ),
        ("--backend tensort", ("unknown backend 'tensort'", "did you mean tensorrt")),
        ("--backend tensorrt-rtx", ("cannot build for cpu", "--backend onnxruntime")),
        ("--gpu h200 --backend tensorrt-rtx", ("only for compute capability", "--backend onnxruntime")),
        ("--gpu a100 --precision fp8", ("a100 (sm_80) does not compute in fp8", "fp32 or bf16")),
        ("--precision fp16", ("unknown precision 'fp16'",)),
        ("--sparsity 1", ("--sparsity", "1 is outside [0, 1)")),
        ("--sparsity -0.1", ("--sparsity", "-0.1 is outside [0, 1)")),
        ("--sparsity nan", ("--sparsity", "nan is outside [0, 1)")),
        ("--sparsity much", ("'much' is no number",)),
        ("--sparsity 0.8 --sparsity-base 0.7", ("base is 0.7, below the target 0.8",)),
        ("--sparsity 0.1 --sparsity-base 0.98", ("bring base and target closer together",)),
        ("--keep-frames 2", ("keep_frames is 2; expected at least sink + near = 3",)),
        ("--keep-frames 0", ("0 is too small",)),
        ("--sink -1", ("'-1' is no whole number",)),
        ("--frames 0", ("0 is too small",)),
        ("--window 3", ("cache.sink_frames is 1",)),
        ("--resolution 120x128", ("120x128 does not divide by 16", "the nearest is 128x128")),
        ("--resolution 0x128", ("does not divide", "16x128")),
        ("--resolution 512", ("'512' is no HEIGHTxWIDTH",)),
        (
            "--init random --checkpoint pyproject.toml",
            ("--checkpoint and random weights exclude each other",),
        ),
        ("--seed 1 --vae pyproject.toml", ("--vae and random weights exclude each other",)),
        ("--checkpoint pyproject.toml", ("without --vae, --text-encoder, --tokenizer",)),
        ("--checkpoint no-such-file", ("no-such-file does not exist",)),
        ("--lora pyproject.toml", ("--lora needs the --checkpoint",)),
        ("--name ../elsewhere", ("is no plain name",)),
        ("--seed first", ("'first' is no whole number",)),
        ("--seed 9223372036854775808", ("is too large",)),
        ("--frames 3000000", ("sparsity.table_frames",)),
        ("--weights embedded", ("--weights embedded is about segments",)),
        ("--skip auto", ("--skip is for quantized linears, and fp32 has none",)),
        ("--gpu rtx3090 --precision nvfp4", ("rtx3090 (sm_86) does not compute in nvfp4",)),
        ("--colour red", ("unrecognized arguments: --colour red", "--help")),
    ],
)
def test_bad_build_arguments(
    arguments: str, messages: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    error = refused(capsys, "build", "--out", str(out), *arguments.split())
    for message in messages:
        assert message in error
    assert not out.exists()


@RTX
@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ("--gpu rtx5090 --execution whole", ("tensorrt-rtx executes the step segmented only",)),
        ("--gpu rtx5090 --precision bf16 --skip *.ffn.2", ("bf16 has none; use --precision fp8",)),
        ("--gpu rtx5090 --fp8-activations static", ("--calibration FILE (python -m export calibrate",)),
        ("--gpu rtx5090 --skip blocks.9.*", ("'blocks.9.*' matches none of the 48 linears",)),
        ("--gpu rtx5090 --skip blocks.0.*", ("in some layers only", "--weights embedded")),
        ("--gpu rtx5090 --precision auto", ("needs --error-budget X, and --calibration FILE",)),
        ("--gpu rtx5090 --error-budget 0.1", ("--error-budget is for --precision auto",)),
        ("--gpu rtx5090 --error-budget 0", ("0 is no positive number",)),
        ("--gpu rtx5090 --skip auto --skip *.ffn.2", ("--skip auto decides about every linear",)),
        ("--gpu rtx5090 --calibration pyproject.toml", ("pyproject.toml is no calibration",)),
        ("--gpu rtx5090 --per-chunk", ("--per-chunk writes graphs for onnxruntime",)),
    ],
)
def test_bad_arguments_of_device_bundles(
    arguments: str, messages: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    test_bad_build_arguments(arguments, messages, capsys, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("bulid", "invalid choice: 'bulid'"),
        ("inspect", "the following arguments are required: bundle"),
        ("inspect no-such-folder", "no bundle at no-such-folder"),
        ("compare no-such-folder", "no bundle at no-such-folder"),
        ("compare x --tolerance 0", "0 is no positive number"),
        ("calibrate", "the following arguments are required: --prompts"),
        ("calibrate --prompts nowhere.txt", "nowhere.txt does not exist"),
        ("calibrate --prompts /dev/null", "holds no prompt"),
        ("calibrate --prompts pyproject.toml --out nowhere/ranges.json", "nowhere is no folder"),
        ("calibrate --prompts pyproject.toml --out tests", "it is a folder"),
        ("compare x --checkpoint pyproject.toml", "without --vae, --text-encoder, --tokenizer"),
        ("targets rtx6090", "unknown target 'rtx6090'; did you mean rtx"),
    ],
)
def test_bad_arguments_of_the_other_commands(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, *arguments.split())


def test_missing_library_is_named() -> None:
    blocked = "import sys; sys.modules['torch'] = None; from export.cli.main import main; sys.exit(main(sys.argv[1:]))"
    result = subprocess.run(
        [sys.executable, "-c", blocked, "compare", "x"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "torch" in result.stderr
    assert "pip install '.[cpu,text,video,export]'" in result.stderr


def test_calibration_without_modelopt_is_refused_before_any_work() -> None:
    blocked = (
        "import sys; sys.modules['modelopt'] = None; "
        "from export.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", blocked, "calibrate", "--prompts", "pyproject.toml"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert "needs NVIDIA ModelOpt" in result.stderr and "`quantize` extra" in result.stderr


def test_debug_shows_the_traceback() -> None:
    command = [sys.executable, "-m", "export", "targets", "rtx6090", "--debug"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Traceback" in result.stderr
    assert "unknown target 'rtx6090'" in result.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_is_the_docstring(command: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command.name, "--help"])  # type: ignore[attr-defined]
    assert stop.value.code == 0
    text = capsys.readouterr().out
    summary = (type(command).__doc__ or "").strip().splitlines()[0]
    assert summary in " ".join(text.split())
    assert "--debug" in text


def test_targets_as_tables_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets"]) == 0
    text = capsys.readouterr().out
    assert "rtx5090" in text
    assert "longlive" in text
    assert main(["targets", "--json"]) == 0
    everything = json.loads(capsys.readouterr().out)
    for kind in ("targets", "variants"):
        files = {path.stem for path in (ROOT / "engines" / kind).glob("*.toml")}
        assert {entry["name"] for entry in everything[kind]} == files
    assert main(["targets", "h200", "--json"]) == 0
    (h200,) = json.loads(capsys.readouterr().out)["targets"]
    assert h200["compute_capability"] == "9.0"
    assert h200["peak"]["memory_gb_s"] == 4800


def test_build_passes_its_settings_on(tmp_path: Path) -> None:
    command = "build --gpu rtx4090 --backend onnxruntime --resolution 256x384 --seed 5 --variant long --sparsity 0.5"
    args = _parser().parse_args(
        [*command.split(), "--keep-frames", "4", "--window", "9", "--per-chunk", "--out", str(tmp_path)]
    )
    args.command_line = command
    request, choice = build_request(args)
    assert choice.backend == request.backend == "onnxruntime"
    assert (request.target.name, request.preset.name, request.precision) == ("rtx4090", "tiny", "fp32")
    assert (request.execution, request.embedded, request.quantization.skip) == ("whole", False, ())
    assert (request.height, request.width, request.weights.seed, request.per_chunk) == (256, 384, 5, True)
    assert (request.out, request.name, request.command) == (
        tmp_path,
        "rtx4090-tiny-long-custom-onnxruntime",
        command,
    )
    files = request.weights
    assert (files.checkpoint, files.vae, files.text_encoder, files.tokenizer) == (None,) * 4
    assert files.loras == ()
    sparsity, cache = request.variant.sparsity, request.variant.cache
    assert (sparsity.target, sparsity.base, sparsity.keep_frames) == (0.5, pytest.approx(0.6), 4)
    assert (cache.window_frames, cache.sink_positions) == (9, "window")


@pytest.mark.parametrize("variant", ["short", "long", "hopper", "dense"])
def test_the_flags_of_the_attention_reach_the_graph_and_the_manifest(variant: str) -> None:
    flags = "--sparsity 0.6 --sparsity-base 0.7 --keep-frames 5 --sink 2 --near 1"
    args = _parser().parse_args(["build", "--variant", variant, *flags.split()])
    args.command_line = ""
    plan = build_request(args)[0].plan
    assert (plan.spec.hsa.keep_frames, plan.spec.hsa.sink_frames, plan.spec.hsa.near_frames) == (5, 2, 1)
    sections = plan.manifest_sections()
    attention, sparsity = sections["attention"], sections["sparsity"]
    assert (attention.keep_frames, attention.sink_frames, attention.near_frames) == (5, 2, 1)
    assert (sparsity.target, sparsity.base) == (0.6, 0.7)
    later = sparsity.values[1:]
    assert (
        sparsity.values[0] == 0 and all(0 < value < 0.7 for value in later) and list(later) == sorted(later)
    )
    assert plan.spec.keep_q20[1:] == tuple(pytest.approx((1 - value) * 2**20, abs=64) for value in later)


def test_build_from_files_has_no_seed(tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("checkpoint", "lora", "text_encoder", "tokenizer")}
    for path in paths.values():
        path.touch()
    files = shipped("tiny")
    assert files is not None
    paths["vae"] = files.vae  # read at once: it says which decoder is planned for
    flags: list[str] = []
    for name, path in paths.items():
        flags += [f"--{name.replace('_', '-')}", str(path)]
    args = _parser().parse_args(["build", "--preset", "wan-1.3b", "--gpu", "h200", *flags, "--name", "mine"])
    args.command_line = ""
    request, _ = build_request(args)
    assert request.weights.loras == (MergedLoRA(paths.pop("lora")),)
    assert {name: getattr(request.weights, name) for name in paths} == paths
    assert (request.weights.seed, request.name, request.variant.name) == (None, "mine", "hopper")
    assert (request.height, request.width) == (512, 768)
    assert request.preset.vae == TINY_VAE, "the file's, not the preset's"


def test_onnx_writes_the_step_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["onnx", "--resolution", "32x32", "--out", str(tmp_path)]) == 0
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    assert folder.parent == tmp_path
    assert (folder / "step.onnx").is_file()


@pytest.mark.parametrize(
    ("target", "name", "precision"),
    [
        ("cpu", "cpu-tiny-short", "fp32"),
        pytest.param("rtx5090", "rtx5090-tiny-short-bf16", "bf16", marks=RTX),
        pytest.param("rtx3090", "rtx3090-tiny-short-bf16", "bf16", marks=RTX),
    ],
)
def test_a_graph_that_is_not_quantized_is_not_called_so(target: str, name: str, precision: str) -> None:
    args = _parser().parse_args(["onnx", "--gpu", target])
    args.command_line = ""
    request = graph_request(args)
    assert (request.name, request.precision) == (name, precision)


def test_inspect_prints_tables_and_json(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_bundle)]) == 0
    assert "vae_next" in capsys.readouterr().out
    assert main(["inspect", str(tiny_bundle), "--json"]) == 0
    json.loads(capsys.readouterr().out)


def test_compare_exits_with_1_past_its_tolerance(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.json"
    command = ["compare", str(tiny_bundle), "--chunks", "1", "--tolerance", "1e-12", "--json", str(table)]
    assert main(command) == 1
    assert json.loads(table.read_text())["passed"] is False
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ([], "cpu-tiny-short"),
        (["--backend", "onnxruntime", "--variant", "dense"], "cpu-tiny-dense"),
        (["--backend", "inductor"], "cpu-tiny-short-inductor"),
        (["--backend", "inductor", "--name", "mine"], "mine"),
    ],
)
def test_names_tell_backends_apart(options: list[str], name: str) -> None:
    args = _parser().parse_args(["build", "--init", "random", *options])
    args.command_line = ""
    assert build_request(args)[0].name == name


@pytest.mark.parametrize(
    ("argument", "kept"),
    [
        ("/home/someone/weights/short.pt", "short.pt"),
        ("--checkpoint=/home/someone/short.pt", "--checkpoint=short.pt"),
        ("weights/short.pt", "weights/short.pt"),
        ("org/repo:file.pt@main", "org/repo:file.pt@main"),
        ("--sparsity=0.5", "--sparsity=0.5"),
    ],
)
def test_a_manifest_says_not_where_on_whose_machine(argument: str, kept: str) -> None:
    assert _portable(argument) == kept


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_leaves_no_bundle_and_exits_130(tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-m", "export", "build", "--out", str(tmp_path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert "cpu-tiny-short" in process.stdout.readline()
        partial = tmp_path / ".cpu-tiny-short.partial"
        deadline = time.monotonic() + 120
        while not partial.is_dir() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.startswith(f"interrupted; finished parts are kept in {partial} (")
    assert "the same command resumes" in errors and errors.count("\n") == 1 and partial.is_dir()
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize(
    ("arguments", "prompt"),
    [
        ("", "a yellow square on black moves right from the top left"),
        ("--init random", "a red fox in snow"),
        ("--preset wan-1.3b", "a red fox in snow"),
    ],
)
def test_the_prompt_that_a_build_suggests_is_one_that_its_weights_know(arguments: str, prompt: str) -> None:
    args = _parser().parse_args(["build", *arguments.split()])
    args.command_line = ""
    request, _ = build_request(args)
    assert request.weights.example_prompt == prompt
    command, verify = _next_commands("built here", prompt, on_device=False)
    assert shlex.split(verify) == ["python", "-m", "runtime", "verify", "built here"]
    assert shlex.split(command)[4:7] == ["built here", "--prompt", prompt]
