"""What latents are called: a local file first, and Neuronpedia when asked for.

    sae: labels: my_labels.jsonl       in a profile: {"7": "dates"}, or a line a latent, {"latent": 7, "label": "dates"}
    LABELS=neuronpedia                 in .env: what the file lacks is asked for over the network

The public endpoint GET /api/feature/MODEL/SOURCE/LATENT needs no key, and the `neuronpedia` package (1.2.1) refuses to
read without one, prints every address, waits without a limit and follows redirects with the key in hand. So the
standard library asks. A label is what somebody wrote, not what was measured: `evidence` stands beside it.
"""

import json
import re
from collections.abc import Iterable
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from helpers import session, store
from helpers.entries import DataError, parse
from helpers.profiles import Profile
from helpers.sae.saes import Loaded
from helpers.steering import behaviors

NEURONPEDIA = "https://www.neuronpedia.org"
PATIENCE, LARGEST = 20.0, 1 << 25  # seconds for an answer, and its bytes
LONGEST = 200  # characters of a label


def of(profile: Profile, loaded: Loaded, wanted: Iterable[int]) -> dict[int, str]:
    """Labels of those `wanted` latents of the profile's SAE that have one: out of its file, then, if LABELS says so,
    Neuronpedia's.

    DataError for a file that cannot be used, ValueError for another word in LABELS. A service that does not answer is
    no error.
    """
    how, numbers = profile.sae, sorted(set(wanted))
    found = read(how.labels, loaded.latents) if how and how.labels else {}
    asked = session.setting("LABELS").lower()
    if asked not in ("", "neuronpedia"):
        raise ValueError(f"LABELS={asked!r} given; it may be neuronpedia, or empty for none over the network")
    if asked:
        metadata = getattr(loaded.sae.cfg, "metadata", None)
        name = (how and how.neuronpedia) or getattr(metadata, "neuronpedia_id", None) or ""
        found |= ask(str(name), [i for i in numbers if i not in found])
    return {i: found[i] for i in numbers if i in found}


def _short(label: str) -> str:
    return session.redact(" ".join(label.split()))[:LONGEST]


# --- a file ------------------------------------------------------------------------------------------------------------


def read(file: str, latents: int) -> dict[int, str]:
    """The labels of a file: one JSON object {latent: label}, or an object a line with `latent` and `label` (or `index`
    and `description`, as Neuronpedia's exports have it). Looked for beside the profiles, then from the repository's
    root.

    DataError names the line, and what is wanted: a number from 0 to `latents` - 1, once, and some text.
    """
    beside = session.PROFILES / file
    path = beside if beside.is_file() else session.path(file)
    if not path.is_file():
        raise DataError(f"sae: labels: {file!r}: no such file beside the profile or from the repository's root")
    found: dict[int, str] = {}
    for place, row in _objects(path):
        keys = [key for key in ("latent", "index") if key in row]
        given = {str(row[keys[0]]): row.get("label", row.get("description"))} if keys else row
        for number, label in given.items():
            if not re.fullmatch(r"[0-9]{1,9}", number) or int(number) >= latents:
                raise DataError(f"{place}: latent {number!r:.40}; a number from 0 to {latents - 1} is wanted")
            if not isinstance(label, str) or not label.strip():
                raise DataError(f"{place}: the label of latent {number} is {label!r:.40}; some text is wanted")
            if keys == ["latent"] and int(number) in found:
                raise DataError(f"{place}: latent {number} is there twice; one label for each is wanted")
            found.setdefault(int(number), _short(label))  # exports may explain a latent several times
    return found


def _objects(path: Path) -> list[tuple[str, dict[str, object]]]:
    """(place, object) of a file that is one object, or of its lines."""
    if path.suffix == ".json":
        try:
            whole = parse(path.name, path.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError:
            raise DataError(f"{path.name}: not UTF-8; save the file as UTF-8") from None
        if isinstance(whole, dict):
            return [(path.name, whole)]
    return behaviors.objects(path)


# --- a service ---------------------------------------------------------------------------------------------------------


class _Here(HTTPRedirectHandler):
    """No answer from another address than the one asked: a key would go there too."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


def ask(source: str, wanted: Iterable[int]) -> dict[int, str]:
    """Neuronpedia's labels of latents of a `source`, MODEL/NAME, asked one by one and kept on disk, an empty one where
    there is none.

    What goes wrong is said in one sentence, and the labels are those that were had before. The key
    (NEURONPEDIA_API_KEY), which is not needed, goes to https addresses and to this machine alone, and is in nothing
    that is kept or said.
    """
    numbers = list(wanted)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        print(
            "no labels: Neuronpedia does not know this SAE (sae_lens's registry names no place there, nor the profile)"
        )
        return {}
    base = session.setting("NEURONPEDIA_URL", NEURONPEDIA).rstrip("/")
    file = session.cache_dir() / "labels" / f"{store.digest([base, source])[:24]}.json"
    known, trouble = {int(i): str(label) for i, label in (store.read_json(file) or {}).items()}, ""
    try:
        for latent in [i for i in numbers if i not in known]:
            known[latent] = _label(base, f"{source}/{latent}")
    except (OSError, HTTPException, ValueError) as error:
        trouble = f"; then {urlsplit(base).hostname} gave none: {session.why(error)}"
    if known:
        store.write_file(file, json.dumps({str(i): known[i] for i in sorted(known)}, ensure_ascii=False, indent=0))
    found = {i: known[i] for i in numbers if known.get(i)}
    print(f"Neuronpedia labels {len(found)} of {len(numbers)} latents of {source}{trouble}")
    return found


def _label(base: str, place: str) -> str:
    """The first explanation of one latent, "" where there is none. OSError, HTTPException or ValueError for what is no
    answer."""
    request = Request(f"{base}/api/feature/{place}", headers={"Accept": "application/json"})
    key, where = session.setting("NEURONPEDIA_API_KEY"), urlsplit(base)
    if key and (where.scheme == "https" or where.hostname in ("127.0.0.1", "localhost", "::1")):
        request.add_header("X-Api-Key", key)
    try:
        with build_opener(_Here).open(request, timeout=PATIENCE) as reply:
            answer = parse("the answer", reply.read(LARGEST).decode())
    except HTTPError as error:
        if error.code == 404:  # no such latent there, or a dead one
            return ""
        raise
    explained = answer.get("explanations") if isinstance(answer, dict) else None
    if not isinstance(explained, list):
        raise ValueError("an answer without a list of explanations")
    texts = [x.get("description") for x in explained if isinstance(x, dict)]
    return next((_short(text) for text in texts if isinstance(text, str) and text.strip()), "")
