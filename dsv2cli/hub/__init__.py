"""Models on the Hugging Face hub: what people call them, which files make one, and how these come to this machine.

names.py (with aliases.py) reads what was typed; listing.py asks what a repository holds; choice.py picks, by labels.py;
preview.py looks at the first bytes (gguf_header.py) and refuses what could not be used; transfer.py fetches into what
cache.py lays out; client.py tells what went wrong. The hub's own client makes the requests, so HF_ENDPOINT, HF_TOKEN,
HF_HOME and HF_HUB_OFFLINE mean what they always mean.
"""

from dsv2cli.hub.aliases import ALIASES
from dsv2cli.hub.choice import check_wishes, choose, select
from dsv2cli.hub.listing import Listing, Plan, RemoteFile, list_files
from dsv2cli.hub.names import Reference, resolve

__all__ = [
    "ALIASES",
    "Listing",
    "Plan",
    "Reference",
    "RemoteFile",
    "check_wishes",
    "choose",
    "list_files",
    "resolve",
    "select",
]
