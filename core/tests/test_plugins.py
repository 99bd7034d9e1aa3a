"""Loading: broken plugins are listed with the reason and the rest work; names are looked up with helpful errors."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

import spikeplug
from spikeplug import plugins
from spikeplug.errors import OptionError, PluginError, UnknownNameError

GOOD = """
    from spikeplug import hookimpl
    spikeplug_api = 1
    @hookimpl
    def spikeplug_encoders():
        return {"fine": "spikeplug.coding.rate:Rate"}
"""

HOSTILE = {
    "raises": ("raise RuntimeError('boom')", "RuntimeError: boom"),
    "lacks": ("import no_such_package_here", "No module named 'no_such_package_here'"),
    "leaves": ("raise SystemExit(3)", "SystemExit: 3"),
    "bad-signature": (
        "from spikeplug import hookimpl\nspikeplug_api = 1\n@hookimpl\ndef spikeplug_encoders(extra): return {}",
        "extra",
    ),
    "unknown-hook": (
        "from spikeplug import hookimpl\nspikeplug_api = 1\n@hookimpl\ndef spikeplug_encoder(): return {}",
        "unknown hook 'spikeplug_encoder', did you mean 'spikeplug_encoders'?",
    ),
    "wrong-type": (
        "from spikeplug import hookimpl\nspikeplug_api = 1\n@hookimpl\ndef spikeplug_encoders(): return ['x']",
        "must return a dict of name to 'module:object'",
    ),
    "hook-raises": (
        "from spikeplug import hookimpl\nspikeplug_api = 1\n@hookimpl\ndef spikeplug_encoders(): return 1 / 0",
        "ZeroDivisionError",
    ),
    "no-api": ("from spikeplug import hookimpl", "states no `spikeplug_api`"),
    "newer-api": ("spikeplug_api = 99", "was written for API 99, this spikeplug has API 1"),
}


@pytest.fixture
def install(tmp_path, monkeypatch, fresh_registry):
    """Installs a distribution of one module with one entry point."""

    def install(name: str, code: str) -> None:
        module = f"hostile_{name.replace('-', '_')}"
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(code))
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dist-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[spikeplug]\n{name} = {module}\n")
        fresh_registry.cache_clear()

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    yield install
    for module in [name for name in sys.modules if name.startswith("hostile_")]:
        del sys.modules[module]


def _info(name):
    return next(plugin for plugin in plugins.registry().plugins if plugin.name == name)


@pytest.mark.parametrize(("code", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_broken_plugin_is_listed_with_the_reason_and_the_rest_work(install, code, reason):
    install("hostile", code)
    install("good", GOOD)
    assert reason in _info("hostile").broken
    assert _info("hostile").parts == ()
    assert spikeplug.get_encoder("fine", steps=3).steps == 3
    assert spikeplug.get_encoder("rate").name == "rate"


def test_unknown_name_says_installed_nearest_and_broken(install):
    install("hostile", "raise RuntimeError('boom')")
    with pytest.raises(UnknownNameError, match=r"unknown encoder 'rat', did you mean 'rate'.*Installed: .*rate"):
        spikeplug.get_encoder("rat")
    with pytest.raises(UnknownNameError, match="Broken plugins, see `spikeplug plugins`: hostile"):
        spikeplug.get_encoder("rat")


def test_unknown_first_party_name_says_the_pip_line(monkeypatch):
    bare = plugins.Registry(tuple(plugin for plugin in plugins.registry().plugins if plugin.name == "core"), None)
    with pytest.raises(UnknownNameError, match="pip install spike-plugin-bse"):
        bare.find("recipe", "bse")


def test_two_plugins_with_one_name_are_an_error_that_names_both(install):
    install("first", GOOD)
    install("second", GOOD)
    with pytest.raises(PluginError, match=r"'fine' is claimed by plugin 'first' .* and plugin 'second'"):
        spikeplug.get_encoder("fine")
    assert spikeplug.get_encoder("rate")


def test_disabled_plugin_is_not_imported(install, monkeypatch):
    install("hostile", "import os; os._exit(9)")
    monkeypatch.setenv("SPIKEPLUG_DISABLE", "hostile")
    assert "hostile" not in {plugin.name for plugin in plugins.registry().plugins}


def test_part_that_cannot_be_imported_is_an_error_that_names_the_plugin(install):
    install("good", GOOD.replace("spikeplug.coding.rate:Rate", "no_such_module:Rate"))
    with pytest.raises(PluginError, match=r"encoder 'fine' of plugin 'good' .* 'no_such_module:Rate'"):
        spikeplug.get_encoder("fine")


def test_unknown_option_says_the_nearest():
    with pytest.raises(OptionError, match=r"unknown option 'step' of encoder 'rate', did you mean 'steps'"):
        spikeplug.get_encoder("rate", step=3)


def test_unknown_kind_says_the_kinds():
    with pytest.raises(OptionError, match=r"unknown kind of part 'encodr', did you mean 'encoder'"):
        plugins.registry().names("encodr")


def test_probe_reports_what_would_end_or_hang_the_process(install):
    install("good", GOOD)
    assert plugins.probe(_info("good")) is None
    install("late", GOOD.replace("fine", "late").replace("spikeplug.coding.rate:Rate", "no_such_module:Rate"))
    assert "no_such_module" in plugins.probe(_info("late"))
    slow = plugins.PluginInfo("core", "spikeplug", "0", 1, (), None, 0.0)
    assert plugins.probe(slow, seconds=0.01) == "not imported after 0.01 s"


def test_every_part_of_every_installed_plugin_can_be_imported():
    for plugin in plugins.registry().plugins:
        assert plugin.broken is None
        for part in plugin.parts:
            assert part.load() is not None


@pytest.mark.parametrize("arguments", [["plugins", "--json"], ["ls", "recipes"], ["--help"]], ids=" ".join)
def test_listing_imports_no_torch(arguments):
    code = (
        "import sys; from spikeplug.cli import main; sys.argv = ['spikeplug', *sys.argv[1:]]\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_plugins_command_gives_json():
    done = subprocess.run(
        [sys.executable, "-m", "spikeplug", "plugins", "--json"], capture_output=True, text=True, check=True
    )
    assert "core" in {plugin["name"] for plugin in json.loads(done.stdout)}


def _brings(hook, path):
    return (
        f"print('hello')\nfrom spikeplug import hookimpl\nspikeplug_api = 1\nnothing = None\n"
        f"@hookimpl\ndef spikeplug_{hook}(): return {{'odd': '{path}'}}"
    )


@pytest.mark.parametrize(
    ("hook", "path", "kind", "message"),
    [
        ("recipes", "hostile_odd:nothing", "recipe", "is None, no Recipe"),
        ("encoders", "spikeplug.coding.rate:check_steps", "encoder", "no class"),
        ("encoders", "spikeplug.coding.rate:IF", "encoder", "is a class that is no Encoder"),
        ("commands", "hostile_odd:nothing", "command", "is None, which cannot be called"),
    ],
)
def test_part_of_the_wrong_sort_is_an_error(install, hook, path, kind, message):
    install("odd", _brings(hook, path))
    with pytest.raises(PluginError, match=message):
        plugins.get_class(kind, "odd")
    found = next(plugin for plugin in plugins.registry().plugins if plugin.name == "odd")
    assert message in plugins.probe(found)


def test_what_a_plugin_prints_is_no_result(install, capsys):
    install("odd", _brings("encoders", "spikeplug.coding.rate:Rate"))
    assert "odd" in plugins.registry().names("encoder")
    assert capsys.readouterr() == ("", "hello\n")


def test_one_bad_command_leaves_the_others(install, capsys, monkeypatch):
    from spikeplug.cli import main

    install("odd", _brings("commands", "hostile_odd:nothing"))
    monkeypatch.setattr(sys, "argv", ["spikeplug", "ls", "recipes"])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert not end.value.code
    assert "bse" in out
    assert "warning: command 'odd' of plugin 'odd'" in err
