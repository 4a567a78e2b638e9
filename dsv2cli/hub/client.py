"""client.py: the hub's own client, and what its exceptions mean: one line with the cause, and a hint that helps.

Below it are a TLS stack, proxies and a dozen environment variables that a person may have set to anything.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dsv2cli.errors import CliError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
TIMEOUTS = ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT")
PROXIES = tuple(f"{n}_PROXY" for n in ("HTTPS", "HTTP", "ALL")) + tuple(f"{n}_proxy" for n in ("https", "http", "all"))
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSLKEYLOGFILE")
FOLDERS = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")


class UnreachableError(CliError):
    """No answer from the hub: the network, the name, or the server."""


def has_token() -> bool:
    """Whether requests carry a token."""
    with translated_errors(""):
        from huggingface_hub import get_token

        return get_token() is not None


def ask_whether_there() -> None:
    """CliError where the hub does not answer, or refuses the token."""
    settings = constants()
    if settings.HF_HUB_OFFLINE:
        raise CliError("HF_HUB_OFFLINE forbids asking the hub", "unset it to ask")
    with translated_errors("the hub"):
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        # Once: the client's own listings go on asking for half a minute.
        asked = f"{settings.ENDPOINT}/api/models?limit=1"
        hf_raise_for_status(get_session().get(asked, headers=build_hf_headers(), timeout=settings.HF_HUB_ETAG_TIMEOUT))


class MissetError(UsageError):
    """A variable of the environment holds something that the hub's client cannot work with."""


def constants() -> Any:
    """The client's settings, as the environment makes them. CliError where it makes none."""
    with translated_errors(""):
        # By its full name: the package's lazy import prints what goes wrong before it raises.
        return importlib.import_module("huggingface_hub.constants")


class translated_errors:
    """Turns the hub client's exceptions into one line and a hint."""

    def __init__(self, repo: str, revision: str = "main") -> None:
        self.repo, self.revision = repo, revision

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, CliError):
            told = explain(error, self.repo, self.revision)
            if told is not None:
                raise told from error


def explain(error: Exception, repo: str, revision: str) -> CliError | None:  # noqa: PLR0911
    """What a failed request means and what to do about it; None for exceptions that are not the hub's."""
    try:
        errors = importlib.import_module("huggingface_hub.errors")
        settings = importlib.import_module("huggingface_hub.constants")
    except Exception:  # its own import fails on what a variable holds
        return misset() or _unknown(error)
    response = getattr(error, "response", None)
    if isinstance(error, errors.HfHubHTTPError) and response is not None:
        return _refused(error, errors, response.status_code, repo, revision, settings.ENDPOINT)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return CliError("HF_HUB_OFFLINE forbids asking the hub", "unset it, or use a model that is in the cache")
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"`{repo}` cannot be a model's name on the hub", "names read owner/name")
    if isinstance(error, (errors.HTTPError, ConnectionError, TimeoutError)):
        reason = str(error) or type(error).__name__
        return misset() or UnreachableError(f"cannot reach {settings.ENDPOINT}: {reason}", _network_hint())
    if isinstance(error, OSError):  # of this disk: its own words tell it, unless a variable led there
        return misset()
    if isinstance(error, (ImportError, ValueError, RuntimeError)):
        return misset() or _unknown(error)
    return None


def _network_hint() -> str:
    proxies = [name for name in PROXIES if os.environ.get(name)]
    through = f" and the proxy that {proxies[0]} names" if proxies else ""
    return f"check the network{through}; the same command resumes"


def _unknown(error: Exception) -> CliError:
    held = [name for name in os.environ if name.startswith(("HF_", "HUGGING")) or name in PROXIES]
    hint = f"these variables change what it does: {', '.join(sorted(held))}" if held else ""
    return CliError(f"the hub's client cannot work here: {error}", hint or "DSV2_DEBUG=1 shows where")


def _refused(error: Exception, errors: Any, status: int, repo: str, revision: str, endpoint: str) -> CliError:
    page = f"{endpoint}/{repo}"
    by_kind = (  # more telling than the status; the first that fits
        (
            errors.GatedRepoError,
            f"{repo} is gated: its owners ask you to accept their terms",
            f"accept them at {page}, then set HF_TOKEN",
        ),
        (errors.DisabledRepoError, f"{repo} is disabled: the hub gives out none of its files", f"{page} may say why"),
        (
            errors.RevisionNotFoundError,
            f"{repo} has no revision `{revision}`",
            f"branches and tags are listed at {page}/tree/main",
        ),
        (
            errors.RepositoryNotFoundError,
            f"no model `{repo}` on {endpoint}, or it is private",
            "check the name; for a private one set HF_TOKEN to a token that may read it",
        ),
    )
    for kind, message, hint in by_kind:
        if isinstance(error, kind):
            return CliError(message, hint)
    told = {
        401: ("the hub does not accept the token (401)", "set HF_TOKEN to a valid one, or unset it for public models"),
        403: (
            f"the hub forbids reading {repo} (403)",
            f"see {page}; HF_TOKEN must belong to an account that may read it",
        ),
        404: (f"the hub has no such file in {repo} (404)", f"see {page}/tree/main"),
        407: ("the proxy asks for a name and a password (407)", "as in HTTPS_PROXY=http://name:password@host:port"),
        429: (
            "the hub says: too many requests (429)",
            "wait some minutes, or set HF_TOKEN for a higher limit; the same command resumes",
        ),
    }
    if status in told:
        return CliError(*told[status])
    if status >= 500:
        return CliError(f"the hub is in trouble ({status})", "try again later; the same command resumes")
    return CliError(f"the hub refused the request for {repo} ({status})", f"see {page}")


# What the environment holds. Values are not repeated where they may hold a secret.


def misset() -> MissetError | None:
    """The first variable that the client cannot work with, told; None where it can with all."""
    checks: list[tuple[tuple[str, ...], Callable[[str, str], tuple[str, str] | None]]] = [
        (TIMEOUTS, _check_timeout),
        (("HF_ENDPOINT",), _check_endpoint),
        (TOKENS, _check_header),
        (("HF_HUB_USER_AGENT_ORIGIN",), _check_header),
        (PROXIES, _check_proxy),
        (CERTIFICATES, _check_certificates),
        (FOLDERS, _check_folder),
    ]
    for variables, check in checks:
        for name in variables:
            value = os.environ.get(name)
            if value is not None and (found := check(name, value)):
                return MissetError(*found)
    return _stored_token()


def _check_timeout(name: str, value: str) -> tuple[str, str] | None:
    if value == "" or value.strip().isdecimal():
        return None
    return f"{name} is `{value}`, not a number of whole seconds", f"set it as in {name}=30, or unset it"


def _check_endpoint(name: str, value: str) -> tuple[str, str] | None:
    try:
        parts = urlsplit(value)
        if parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0):
            return None
    except ValueError:
        pass
    return f"{name} is `{value}`, not the address of a server", f"as in {name}=https://huggingface.co, or unset it"


def _check_header(name: str, value: str) -> tuple[str, str] | None:
    odd = [i for i, sign in enumerate(value.strip()) if not " " <= sign <= "~"]
    if not odd:
        return None
    return (
        f"{name} holds a sign that cannot be sent: {value.strip()[odd[0]]!r}, the {odd[0] + 1}. of it",
        f"set {name} again (letters that look alike, quotes and breaks come with pasting), or unset it",
    )


def _check_proxy(name: str, value: str) -> tuple[str, str] | None:
    if not value:
        return None
    scheme = value.partition("://")[0].lower() if "://" in value else "http"
    if scheme.startswith("socks"):
        try:
            importlib.import_module("socksio")
        except ImportError:
            return (
                f"{name} names a SOCKS proxy, and the package that speaks to one is not installed",
                f"pip install socksio, or set {name} to an http:// proxy",
            )
    if scheme not in ("http", "https", "socks5", "socks5h"):
        return f"{name} names a proxy of the kind `{scheme}`", "http://, https:// and socks5:// work; or unset it"
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        if parts.hostname and (parts.port is None or parts.port > 0):
            return None
    except ValueError:
        pass
    return f"{name} is not the address of a proxy", f"as in {name}=http://host:port, or unset it"


def _check_certificates(name: str, value: str) -> tuple[str, str] | None:
    if name == "SSLKEYLOGFILE":
        there = os.access(os.path.dirname(value) or ".", os.W_OK)  # noqa: PTH120
    else:
        there = not value or os.path.exists(value)  # noqa: PTH110
    return None if there else (f"{name} is `{value}`, which is not there", "correct it or unset it")


def _check_folder(name: str, value: str) -> tuple[str, str] | None:
    place = os.path.expanduser(value)  # noqa: PTH111
    if value and (not os.path.exists(place) or os.path.isdir(place)):  # noqa: PTH110, PTH112
        return None
    return f"{name} is `{value}`, not a folder", "name a folder for the hub's cache, or unset it"


def _stored_token() -> MissetError | None:
    """The token that `hf auth login` wrote, where it cannot be sent."""
    try:
        path = importlib.import_module("huggingface_hub.constants").HF_TOKEN_PATH
        with open(path, encoding="utf-8") as file:  # noqa: PTH123
            found = _check_header(f"the token in `{path}`", file.read())
    except UnicodeDecodeError:
        return MissetError(f"`{path}` holds no token: it is not text", "hf auth login writes it anew")
    except (OSError, ValueError):
        return None
    return MissetError(found[0], "hf auth login writes it anew") if found else None
