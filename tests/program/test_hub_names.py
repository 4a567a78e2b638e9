"""What people type for a model: aliases, owner/name:TYPE, links, paths; and which file of this machine that means."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cli import assert_fails, dsv2, dsv2_after

from dsv2cli import locate
from dsv2cli.errors import CliError, UsageError
from dsv2cli.hub import ALIASES, resolve
from dsv2cli.hub.names import Reference

LITE = "deepseek-ai/DeepSeek-V2-Lite"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lite", Reference(LITE)),
        ("GLM-4.7-Flash", Reference("zai-org/GLM-4.7-Flash")),
        ("owner/name", Reference("owner/name")),
        ("lite:q4_k_m", Reference(LITE, gguf_type="q4_k_m")),
        ("unsloth/V3-GGUF:UD-Q4_K_XL", Reference("unsloth/V3-GGUF", gguf_type="UD-Q4_K_XL")),
        ("owner/name:latest", Reference("owner/name")),
        (f"https://huggingface.co/{LITE}", Reference(LITE)),
        (f"http://www.huggingface.co/{LITE}/", Reference(LITE)),
        (f"hf.co/{LITE}:Q8_0", Reference(LITE, gguf_type="Q8_0")),
        (f"hf://{LITE}", Reference(LITE)),
        (f"huggingface.co/{LITE}?library=x", Reference(LITE)),
        (f"https://huggingface.co/{LITE}/tree/main", Reference(LITE, "main")),
        (f"https://hf.co/{LITE}/blob/main/config.json", Reference(LITE, "main")),
        ("https://hf.co/o/n/blob/v1/sub/a-Q4_0.gguf", Reference("o/n", "v1", glob="sub/a-Q4_0.gguf")),
        ("https://hf.co/o/n/resolve/main/a%5B1%5D.gguf?download=true", Reference("o/n", "main", glob="a[[]1].gguf")),
        ("https://hf.co/o/n/tree/main/UD-Q4_K_XL", Reference("o/n", "main", glob="UD-Q4_K_XL/*")),
    ],
)
def test_names(text: str, expected: Reference) -> None:
    assert resolve(text) == expected


def test_a_mirror_is_known_by_its_own_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.test:8080")
    assert resolve("http://mirror.test:8080/o/n") == Reference("o/n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("DeepSeek-V2-Lite", [f"did you mean {LITE}?"]),
        ("deepseek-v2-lite-chat-gguf", [f"{LITE}-Chat"]),
        ("moonlite", ["moonlight"]),
        ("glm-4.7-flahs", ["glm-4.7-flash"]),
        ("zzzz", ["aliases: lite"]),
        ("owner/name/file.Q4_0.gguf.x", ["owner/name", "--file"]),
        ("https://example.com/o/n", ["not a page of the hub"]),
        ("https://huggingface.co/datasets/o/n", ["not a model's page"]),
        ("https://huggingface.co/", ["not a model's page"]),
        ("http://[x/y", ["not a page of the hub"]),
        ("own--er/name", ["neither"]),
        ("owner/../name", ["neither"]),
        ("o/" + "n" * 100, ["neither"]),
        ("o/name.git", ["neither"]),
        ("", ["neither"]),
    ],
)
def test_no_names(text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        resolve(text)
    for word in words:
        assert word in f"{error.value} | {error.value.hint}"


@pytest.mark.parametrize(
    "text",
    ["./nope", "../nope", "/nosuch/dir", "~/nope", "nope/", "sub/nope.gguf", "C:\\nope", "a\\b", "x/config.json"],
)
@pytest.mark.parametrize("verb", ["download", "chat", "quantize", "inspect"])
def test_a_mistyped_path_is_not_a_name_on_the_hub(
    text: str, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    find = {"download": resolve, "quantize": locate.checkpoint}.get(verb, locate.model)
    with pytest.raises(CliError) as error:
        find(text)
    told = str(error.value)
    assert "no such file or folder" in told or "holds no GGUF" in told, told


def test_aliases_are_names_on_the_hub() -> None:
    assert len(ALIASES) > 60
    for alias, repo in ALIASES.items():
        assert alias == alias.lower() and resolve(alias) == resolve(repo) == Reference(repo)


def test_the_aliases_can_be_had_as_a_list() -> None:
    shown = dict(line.split() for line in dsv2("download", "--aliases").stdout.splitlines())
    assert shown == ALIASES


# What is here.


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path


def cached(here: Path, repo: str, *names: str) -> Path:
    """A repository in the cache, of empty files."""
    folder = here / "cache" / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("a" * 40)
    for name in names:
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).touch()
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("a" * 40)
    return snapshot


TWO = ("UD-Q4_K_XL/V3-UD-Q4_K_XL-00001-of-00002.gguf", "UD-Q4_K_XL/V3-UD-Q4_K_XL-00002-of-00002.gguf", "V3-Q8_0.gguf")


def test_a_type_chooses_in_the_cache(here: Path) -> None:
    snapshot = cached(here, "o/V3-GGUF", *TWO, "mmproj-Q8_0.gguf")
    assert locate.model("o/V3-GGUF:q8_0") == snapshot / "V3-Q8_0.gguf"
    assert locate.model("o/V3-GGUF:UD-Q4_K_XL") == snapshot / TWO[0]
    assert locate.model("hf.co/o/V3-GGUF:Q4_K_XL") == snapshot / TWO[0]
    assert locate.model("https://hf.co/o/V3-GGUF/blob/main/V3-Q8_0.gguf") == snapshot / "V3-Q8_0.gguf"
    with pytest.raises(UsageError, match="2 GGUF files of o/V3-GGUF") as error:
        locate.model("o/V3-GGUF")
    assert locate.model(error.value.hint.split()[0]).is_file()
    with pytest.raises(CliError, match="no GGUF of o/V3-GGUF:Q2_K here") as none:
        locate.model("o/V3-GGUF:Q2_K")
    assert none.value.hint == "dsv2 download o/V3-GGUF:Q2_K"


def test_one_in_the_cache_needs_no_type(here: Path) -> None:
    snapshot = cached(here, "o/V3-GGUF", *TWO[:2], "imatrix.gguf")
    assert locate.model("o/V3-GGUF") == snapshot / TWO[0]


@pytest.mark.parametrize("asked", ["9.5G", "4.25bpw", "700MiB", "iq4_xs"])
def test_what_was_made_with_any_size_is_found_by_its_alias(here: Path, asked: str) -> None:
    made = here / f"DeepSeek-V2-Lite-{asked.upper()}.gguf"
    made.touch()
    (here / "DeepSeek-V2-Lite-Chat-Q4_K_M.gguf").touch()
    assert locate.model("lite") == made == locate.model(f"lite:{asked}")


def test_hints_of_what_is_not_here(here: Path) -> None:
    def hint(name: str) -> str:
        with pytest.raises(CliError) as error:
            locate.model(name)
        return error.value.hint

    assert hint("unsloth/V3-GGUF") == "dsv2 download unsloth/V3-GGUF"  # quantised already
    assert "dsv2 quantize lite" in hint("lite") and "dsv2 download lite" in hint("lite")
    cached(here, "o/n", "config.json", "model.safetensors")
    assert hint("o/n") == "dsv2 quantize o/n"
    cached(here, "o/g", "g-Q8_0.gguf")
    assert locate.checkpoint("o/g").name == "g-Q8_0.gguf"  # the quantiser tells what of it is quantised already


@pytest.mark.parametrize("name", ["m.gguf.part1of2", "m.Q8_0.gguf.partab", "m.gguf-split-a", "m.part2of3"])
def test_a_piece_is_told_to_be_joined(here: Path, name: str) -> None:
    (here / name).touch()
    with pytest.raises(UsageError, match="piece of a GGUF") as error:
        locate.model(name)
    assert error.value.hint.startswith("in its folder: cat ")


def test_a_snapshot_is_called_by_its_repository(here: Path) -> None:
    snapshot = cached(here, "o/some-odd.Model", "config.json", "model.safetensors")
    assert locate.model_name(str(snapshot), snapshot) == "some-odd.Model"
    assert locate.model_name("o/n", cached(here, "o/n", "config.json")) == "n"
    (here / "plain").mkdir()
    assert locate.model_name("plain", here / "plain") == "plain"


def test_no_home_is_told(tmp_path: Path) -> None:
    """A container: no HOME, and a user of no name."""
    script = "import os, pwd; os.environ.pop('HOME', None); pwd.getpwuid = {}.__getitem__"
    for args, words in (
        (["download", "lite"], ["cannot reach"]),
        (["chat", "lite", "-p", "x"], ["no home folder", "HF_HOME"]),
        (["quantize", "lite"], ["no home folder", "HF_HOME"]),
        (["inspect", "~/nope.gguf"], ["~/nope.gguf", "no such file"]),
    ):
        assert_fails(dsv2_after(script, *args, HF_ENDPOINT="http://127.0.0.1:9"), 1, *words)


# What the environment holds.


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("HF_TOKEN", "hf_tökén", ["HF_TOKEN holds a sign", "'ö'"]),
        ("HF_TOKEN", "hf_\u200bx", ["HF_TOKEN holds a sign"]),
        ("HUGGING_FACE_HUB_TOKEN", "“hf_x”", ["HUGGING_FACE_HUB_TOKEN"]),
        ("HF_HUB_ETAG_TIMEOUT", "abc", ["HF_HUB_ETAG_TIMEOUT is `abc`"]),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "1.5", ["HF_HUB_DOWNLOAD_TIMEOUT is `1.5`"]),
        ("HF_ENDPOINT", "nonsense", ["HF_ENDPOINT is `nonsense`"]),
        ("HF_ENDPOINT", "http://[bad", ["HF_ENDPOINT is `http://[bad`"]),
        ("HF_ENDPOINT", "ftp://x", ["HF_ENDPOINT is `ftp://x`"]),
        ("HF_ENDPOINT", "", ["HF_ENDPOINT is ``"]),
        ("HF_HUB_USER_AGENT_ORIGIN", "ü", ["HF_HUB_USER_AGENT_ORIGIN"]),
        ("ALL_PROXY", "socks5://127.0.0.1:9", ["ALL_PROXY names a SOCKS proxy", "socksio"]),
        ("https_proxy", "socks4://user:secret@127.0.0.1:9", ["https_proxy names a SOCKS proxy"]),
        ("HTTPS_PROXY", "ftp://x:1", ["HTTPS_PROXY names a proxy of the kind `ftp`"]),
        ("SSL_CERT_FILE", "/nope", ["SSL_CERT_FILE is `/nope`"]),
        ("SSLKEYLOGFILE", "/nope/x", ["SSLKEYLOGFILE is `/nope/x`"]),
        ("HF_HOME", "/etc/passwd", ["HF_HOME is `/etc/passwd`, not a folder"]),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(tmp_path: Path, name: str, value: str, words: list[str]) -> None:
    env = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", name: value}
    result = dsv2("download", "owner/name", **env)
    assert_fails(result, 2, *words)
    assert "secret" not in result.stderr


def test_a_stored_token_that_cannot_be_sent(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_é")
    env = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert_fails(dsv2("download", "owner/name", **env), 2, "the token in", "hf auth login")
    (tmp_path / "token").write_bytes(b"\xff\xfe")
    assert_fails(dsv2("download", "owner/name", **env), 2, "token")


def test_a_proxy_is_thought_of_where_nothing_answers(tmp_path: Path) -> None:
    env = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://hub.test", "HTTP_PROXY": "http://127.0.0.1:9"}
    assert_fails(
        dsv2("download", "owner/name", **env), 1, "cannot reach http://hub.test", "proxy that HTTP_PROXY names"
    )
