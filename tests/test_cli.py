"""The command line on tiny models: convert, eval, and a clear line for every bad input."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def _convert(cli, dense_folder, text, tmp_path, *more):
    return cli(
        "convert", dense_folder, "--recipe", "bse", "--calibrate", text, "--out", tmp_path / "spiking", "--seqlen", 32,
        *more,
    )  # fmt: skip


def test_convert_then_eval(cli, dense_folder, text, tmp_path):
    code, out, _ = _convert(cli, dense_folder, text, tmp_path, "-s", "steps=12", "-s", "exclude=head", "--json")
    assert code == 0
    assert out["config"]["encoder_options"] == {"steps": 12}
    assert out["config"]["exclude"] == ["head"]
    assert {op["role"] for op in out["report"]["ops"]} == {"coded", "spiking", "decoded", "dense"}
    arguments = ["--ppl", text, "--seqlen", 32, "--max-tokens", 320, "--json"]
    code, dense, _ = cli("eval", dense_folder, *arguments)
    assert code == 0
    assert "spikes" not in dense
    code, spiking, _ = cli("eval", tmp_path / "spiking", *arguments)
    assert code == 0
    assert spiking["perplexity"] == pytest.approx(dense["perplexity"], rel=0.05)
    assert spiking["perplexity"] != dense["perplexity"]
    protocol = spiking["protocol"]
    assert (protocol["text"], protocol["seqlen"], protocol["stride"], protocol["tokens"]) == ("text.txt", 32, 32, 320)
    assert (protocol["targets"], protocol["bos"], len(protocol["sha256"])) == (310, False, 64)
    assert spiking["spikes"]["per_token"] == spiking["spikes"]["total"] / 320
    assert spiking["report"]["macs_share"]["spiking"] > 0
    assert spiking["config"]["encoder_options"] == {"steps": 12}
    code, stepped, _ = cli("eval", tmp_path / "spiking", *arguments, "--execution", "stepped")
    assert stepped["perplexity"] == pytest.approx(spiking["perplexity"], rel=1e-4)
    assert stepped["spikes"]["total"] == pytest.approx(spiking["spikes"]["total"], rel=1e-3)


def test_eval_is_the_perplexity_of_the_logits(cli, dense_folder, text, tokenizer):
    _, out, _ = cli("eval", dense_folder, "--ppl", text, "--seqlen", 16, "--max-tokens", 48, "--json")
    ids = tokenizer(text.read_text(), return_tensors="pt")["input_ids"][0, :48].reshape(3, 16)
    model = AutoModelForCausalLM.from_pretrained(dense_folder)
    logs = model(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])
    assert out["perplexity"] == pytest.approx(math.exp(-logs.mean().item()), rel=1e-5)


def test_plain_output_says_protocol_and_share(cli, dense_folder, text, tmp_path):
    code, out, _ = _convert(cli, dense_folder, text, tmp_path)
    assert code == 0
    assert "of the MACs per token at context 512 are spiking" in out
    code, out, _ = cli("eval", tmp_path / "spiking", "--ppl", text, "--seqlen", 32, "--max-tokens", 64)
    assert code == 0
    assert "sha256" in out
    assert "spikes" in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--recipe", "bsee"], "unknown recipe 'bsee', did you mean 'bse'"),
        (["-s", "step=3"], "unknown option 'step' of recipe 'bse', did you mean 'steps'"),
        (["-s", "steps=40"], "steps=40: a whole number from 1 to 32"),
        (["-s", "steps"], "write it as -s key=value"),
        (["-s", "encoder=bsx"], "unknown encoder 'bsx'"),
        (["-s", "percentile=abc"], "percentile='abc': Input should be a valid number"),
        (["-s", "align_zero=1"], "align_zero=1: Input should be a valid boolean"),
        (["-s", "encoder_options=5"], "encoder_options=5: Input should be a valid dictionary"),
        (["-s", "recipe=rate"], "'recipe' is no option"),
        (["-s", "encoder=5"], "encoder=5: Input should be a valid string"),
        (["-s", "neuron=if"], "does not fire the spikes of BSE"),
        (["--device", "meta"], "device='meta'"),
        (["--dtype", "float8"], "dtype='float8': choose one of"),
        (["--device", "warp"], "device='warp'"),
        (["--calibrate-tokens", "1"], "at least 2 is needed"),
        (["--calibrate", "no.txt"], "cannot read the text no.txt: it does not exist"),
        (["--out", "/proc/spiking"], "cannot write /proc/spiking"),
        (["--out", "x" * 300], "File name too long"),
        (["--out", f"{__file__}/sub"], "is no folder"),
        (["-s", 'exclude=["no","none"]'], "Kinds and subsystems: activation, attention"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_of_convert_are_one_line(cli, dense_folder, text, tmp_path, more, message):
    code, _, err = _convert(cli, dense_folder, text, tmp_path, *more)
    assert code == 1
    line = next(line for line in err.splitlines() if line.startswith("error: "))
    assert message in line
    assert not (tmp_path / "spiking").exists()


@pytest.mark.parametrize("content", ["", " \n", "a"], ids=["empty", "blank", "one token"])
def test_short_texts_are_one_line(cli, dense_folder, tmp_path, content):
    short = tmp_path / "short.txt"
    short.write_text(content)
    code, _, err = cli("eval", dense_folder, "--ppl", short)
    assert code == 1
    assert "is empty" in err or "the text has 1 token: at least 2 are needed" in err


def test_binary_text_is_one_line(cli, dense_folder, tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    code, _, err = cli("eval", dense_folder, "--ppl", tmp_path / "x.txt")
    assert code == 1
    assert "it is not UTF-8 text" in err


@pytest.mark.parametrize(
    "what", ["missing", "a file", "empty folder", "bad gguf", "truncated", "bad config", "not converted"]
)
def test_what_is_no_model_is_one_line(cli, dense_folder, text, tmp_path, what):
    model = dense_folder
    if what == "missing":
        model = tmp_path / "nowhere"
    elif what == "a file":
        model = text
    elif what == "empty folder":
        model = tmp_path / "empty"
        model.mkdir()
    elif what == "bad gguf":
        model = tmp_path / "x.gguf"
        model.write_bytes(b"GGUF but not really")
    elif what == "truncated":
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    elif what == "bad config":
        (model / "config.json").write_text("{")
    arguments = ["--execution", "stepped"] if what == "not converted" else []
    code, _, err = cli("eval", model, "--ppl", text, *arguments)
    assert code == 1
    assert [line for line in err.splitlines() if line.startswith("error: ")], err


@pytest.mark.parametrize("layers", [1, 3])
def test_weights_that_do_not_fit_the_config_are_one_line(cli, dense_folder, text, layers):
    config = dense_folder / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', f'"num_hidden_layers": {layers}'))
    code, _, err = cli("eval", dense_folder, "--ppl", text)
    assert code == 1
    assert "do not fit its config.json" in err


def test_nan_weights_are_one_line(cli, dense_folder, text, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense_folder)
    model.lm_head.weight.data[0, 0] = float("nan")
    model.save_pretrained(dense_folder)
    code, _, err = _convert(cli, dense_folder, text, tmp_path)
    assert code == 1
    assert "parameter 'lm_head.weight' holds NaN or infinity" in err
    code, _, err = cli("eval", dense_folder, "--ppl", text, "--seqlen", 64)
    assert code == 1
    assert "NaN or infinite" in err


def test_existing_folder_is_kept_unless_forced(cli, dense_folder, text, tmp_path):
    (tmp_path / "spiking").mkdir()
    (tmp_path / "spiking" / "mine").write_text("precious")
    code, _, err = _convert(cli, dense_folder, text, tmp_path)
    assert code == 1
    assert "exists" in err
    assert (tmp_path / "spiking" / "mine").read_text() == "precious"
    code, _, err = _convert(cli, dense_folder, text, tmp_path, "--force")
    assert code == 1
    assert "is no saved model and is not overwritten" in err
    (tmp_path / "spiking" / "mine").unlink()
    assert _convert(cli, dense_folder, text, tmp_path)[0] == 0
    assert _convert(cli, dense_folder, text, tmp_path, "--force", "-s", "steps=8")[0] == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder_is_one_line(cli, dense_folder, text, tmp_path):
    tmp_path.chmod(0o500)
    code, _, err = _convert(cli, dense_folder, text, tmp_path)
    tmp_path.chmod(0o700)
    assert code == 1
    assert "no permission to write" in err


def test_interrupt_in_mid_run_leaves_nothing(cli, dense_folder, text, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("spikeplug.coding.statistics.Reservoir.add", interrupt)
    before = set(tmp_path.iterdir())
    code, _, err = _convert(cli, dense_folder, text, tmp_path)
    assert code == 130
    assert err.endswith("interrupted\n")
    assert set(tmp_path.iterdir()) == before


def test_kill_in_mid_run_leaves_nothing(cli, dense_folder, text, tmp_path, monkeypatch):
    monkeypatch.setattr("spikeplug.conversion.bundle._sync", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    before = set(tmp_path.iterdir())
    assert _convert(cli, dense_folder, text, tmp_path)[0] == 143
    assert set(tmp_path.iterdir()) == before


def test_link_that_leads_nowhere_is_one_line(cli, dense_folder, text, tmp_path):
    (tmp_path / "spiking").symlink_to(tmp_path / "nowhere")
    code, _, err = _convert(cli, dense_folder, text, tmp_path)
    assert code == 1
    assert "is a link that leads nowhere" in err


def test_empty_working_folder_can_be_written(cli, dense_folder, text, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    code, _, err = _convert(cli, dense_folder, text, tmp_path, "--out", ".")
    assert code == 0, err
    assert (tmp_path / "here" / "spikeplug.json").is_file()


def test_tokenizer_of_another_model_is_one_line(cli, dense_folder, text, tokenizer):
    tokenizer.add_tokens(["fox"])
    tokenizer.save_pretrained(dense_folder)
    code, _, err = cli("eval", dense_folder, "--ppl", text)
    assert code == 1
    assert "token 256, the model knows 256: it is not this model's tokenizer" in err


def test_window_beyond_the_context_is_one_line(cli, dense_folder, text):
    code, _, err = cli("eval", dense_folder, "--ppl", text, "--seqlen", 129)
    assert code == 1
    assert "seqlen=129: the model's context is 128 tokens" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "spikeplug", "plugins", "--json"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr == "error: [Errno 28] No space left on device\n"


def test_demo_compares_every_recipe(cli, dense_folder, tmp_path):
    sizes = ["--tokens", 64, "--calibrate-tokens", 64, "--seqlen", 32]
    code, result, err = cli("demo", dense_folder, "--out", tmp_path / "page", *sizes, "--json")
    assert code == 0, err
    names = [row["recipe"] for row in result["rows"]]
    assert names[0] == "dense"
    assert {"base2-round", "bse", "las", "laser", "mgpc", "rate"} <= set(names)
    assert len({row["perplexity"] for row in result["rows"]}) == len(names)
    close = {row["recipe"]: abs(row["change"]) for row in result["rows"]}
    assert max(close["bse"], close["laser"]) < 0.01
    page = (tmp_path / "page" / "index.html").read_text()
    assert "<svg" in page
    assert all(name in page for name in names)


def test_convert_keeps_what_sites_saw_for_another_recipe(cli, dense_folder, text, tmp_path):
    common = ["--calibrate", text, "--seqlen", 32, "--statistics", tmp_path / "seen.safetensors"]
    assert cli("convert", dense_folder, "--recipe", "bse", *common, "--out", tmp_path / "a")[0] == 0
    written = (tmp_path / "seen.safetensors").stat().st_mtime_ns
    assert cli("convert", dense_folder, "--recipe", "las", *common, "--out", tmp_path / "b")[0] == 0
    assert (tmp_path / "seen.safetensors").stat().st_mtime_ns == written
    code, _, err = cli(
        "convert", dense_folder, "--recipe", "las", "-s", "passes=rotate", *common, "--out", tmp_path / "c"
    )
    assert code == 1
    assert "was observed on another model: observe this one anew, into another file" in err
    assert not (tmp_path / "c").exists()
    # LASER's sites see what its approximators give.
    code, _, err = cli("convert", dense_folder, "--recipe", "laser", *common, "--out", tmp_path / "c")
    assert code == 1
    assert "was observed on other approximators" in err


def test_eval_prints_energy_with_its_assumptions(cli, dense_folder, text, tmp_path):
    cli("convert", dense_folder, "--recipe", "bse", "--calibrate", text, "--seqlen", 32, "--out", tmp_path / "a")
    code, out, _ = cli("eval", tmp_path / "a", "--ppl", text, "--seqlen", 32)
    assert code == 0
    assert "x dense" in out
    assert "mac 4.6 pJ" in out
    found = cli("eval", tmp_path / "a", "--ppl", text, "--seqlen", 32, "--json")[1]["energy"]
    assert found["ratio"] > 0
    assert found["macs"] > 0
    assert found["acs"] > 0


def test_hub_id_takes_a_revision_and_says_its_commit(cli, dense_folder, text, tmp_path, monkeypatch):
    """Read from a hub's cache on disk, laid out as huggingface_hub does."""
    one, two = "1" * 40, "2" * 40
    repo = tmp_path / "hub" / "models--org--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(two)
    for commit in (one, two):
        shutil.copytree(dense_folder, repo / "snapshots" / commit)
    weights = repo / "snapshots" / one / "model.safetensors"
    save_file({k: v * 0 for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(repo.parent))
    found = {}
    for source in ("org/tiny", f"org/tiny@{one}", f"org/tiny@{two}"):
        code, found[source], err = cli("eval", source, "--ppl", text, "--seqlen", 32, "--max-tokens", 64, "--json")
        assert not code, err
    assert found["org/tiny"]["protocol"]["model"] == f"org/tiny@{two}"
    assert found[f"org/tiny@{one}"]["protocol"]["model"] == f"org/tiny@{one}"
    assert found["org/tiny"]["perplexity"] == found[f"org/tiny@{two}"]["perplexity"]
    # Weights of zero say nothing: every token is as likely as any other.
    assert found[f"org/tiny@{one}"]["perplexity"] == pytest.approx(256)
    code, _, err = cli("eval", f"org/tiny@{'3' * 40}", "--ppl", text)
    assert code == 1
    assert "cannot read the model 'org/tiny@333" in err


def test_a_dry_run_of_a_language_model_prints_the_plan_and_writes_nothing(cli, dense_folder, text, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = cli("convert", dense_folder, "--recipe", "bse", "--dry-run", "--json")
    assert (code, out["problems"], sorted(tmp_path.rglob("*"))) == (0, [], before)
    _, written, _ = _convert(cli, dense_folder, text, tmp_path, "--json")
    assert {op["name"]: op["role"] for op in out["ops"]} == {op["name"]: op["role"] for op in written["report"]["ops"]}
    code, out, _ = cli("convert", dense_folder, "--recipe", "mgpc", "--dry-run")
    assert code == 0
    assert "lm_head" in out
    assert "Traceback" not in cli("convert", dense_folder, "--recipe", "bse", "-s", "exclude=nothing", "--dry-run")[2]
