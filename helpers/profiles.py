"""Profiles: which models, layer, behaviours and dictionaries the notebooks run on, as one typed object.

    python -m helpers.profiles check notebooks/profiles/smollm2.yaml
    python -m helpers.profiles document > docs/profiles.md

A file is checked whole, before anything is loaded: unknown keys are refused with the nearest known one, numbers may be written as
YAML likes them (`lr: 2e-3` is text to it). Knows nothing of models, of the environment, or of where a profile lies.
"""

import argparse
import difflib
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
)

Layer = Annotated[int, Field(ge=0)]
Several = Annotated[tuple[str, ...], BeforeValidator(lambda given: (given,) if isinstance(given, str) else given)]


class ProfileError(ValueError):
    """A profile that cannot be used; the message names file, key, what is wanted and the nearest known key."""


class Part(BaseModel):
    """A section of a profile: what it may hold, and nothing else."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_yes_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads yes and on as true, which would pass for a one."""
        if isinstance(value, bool) and "bool" not in str(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("a number or text, not yes or no,")
        return value


class Harvest(Part):
    """Text whose activations are kept on disk."""

    source: Several = Field(description="where the text comes from, one or several: see helpers/lm/text.py")
    chats: Annotated[int, Field(ge=0)] = Field(
        0,
        description="length in tokens of every named model's answers to the open prompts, which are read too; 0 for none",
    )
    tokens: PositiveInt = Field(description="tokens to train on")
    held_out: PositiveInt = Field(description="tokens to measure on, from other documents")
    context: Annotated[int, Field(ge=2)] = Field(128, description="tokens of a row")


class Training(Part):
    """How a TopK SAE is trained; what is left out is as `helpers.sae.train.Config` has it."""

    expansion: PositiveInt = Field(description="latents over the width of the model")
    k: PositiveInt = Field(description="latents that fire on a token")
    samples: PositiveInt = Field(description="tokens seen, the same ones several times where there are fewer")
    batch: PositiveInt | None = Field(None, description="tokens of a step")
    lr: PositiveFloat | None = Field(None, description="learning rate")
    warm_up: float | None = Field(None, description="share of steps in which it rises")
    decay: float | None = Field(None, description="share of steps, at the end, in which it falls to zero")
    alpha: float | None = Field(None, description="weight of the auxiliary loss")
    k_aux: int | None = Field(None, description="dead latents in the auxiliary loss; 0: half of the width")
    dead_after: int | None = Field(None, description="tokens after which a latent that has not fired is dead")
    clip: float | None = Field(None, description="longest gradient")
    decoder: Literal["rescale", "unit"] | None = Field(None, description="how decoder rows are kept in length")
    batch_topk: bool | None = Field(None, description="rank a whole batch's codes rather than each token's")
    low: bool | None = Field(None, description="rank latents in bfloat16; by default where that is native")
    pre_bias: Literal["mean", "geometric median"] | None = Field(None, description="where the decoder's bias starts")
    beta1: float | None = Field(None, description="Adam's")
    beta2: float | None = Field(None, description="Adam's")
    log_every: PositiveInt | None = Field(None, description="steps between two lines of the log")
    checkpoint_every: PositiveInt | None = Field(None, description="steps between two checkpoints")

    def settings(self) -> dict[str, Any]:
        """What the profile says, without what it leaves out."""
        return self.model_dump(exclude_none=True)


class Registered(Part):
    """An SAE out of sae_lens's registry."""

    release: str = Field(description="sae_lens's name of the release")
    id: str = Field(description="and of the SAE in it")
    norm_factor: PositiveFloat | None = Field(None, description="its input's scale, where the registry lacks one")


class Above(Part):
    """Dictionaries of the layers above the steered one: trained as its own is, from one pass over less text, or of its release."""

    tokens: PositiveInt = Field(description="tokens to train on")
    held_out: PositiveInt = Field(description="tokens to measure on, from other documents")
    samples: PositiveInt | None = Field(
        None, description="tokens seen in training; as many as the layer's own sees by default"
    )
    ids: dict[int, str] = Field({}, description="or the SAEs in the release, layer: id")


class Sae(Part):
    """The dictionary of the steered model: trained here, or one of sae_lens's registry."""

    harvest: Harvest = Field(description="the text it is trained and measured on")
    train: Training | None = Field(None, description="how it is trained")
    release: str | None = Field(None, description="or sae_lens's name of a release")
    id: str | None = Field(None, description="and of the SAE in it")
    norm_factor: PositiveFloat | None = Field(None, description="its input's scale, where the registry lacks one")
    labels: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="what its latents are called, a JSON or JSONL file: see helpers/sae/labels.py"
    )
    neuronpedia: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = Field(
        None,
        description="its place on Neuronpedia, MODEL/SOURCE, where the registry lacks one; asked only if LABELS says so",
    )
    above: Above | None = Field(
        None, description="those of the layers above, for notebook 08; trained alike by default"
    )

    @property
    def ids_above(self) -> dict[int, str]:
        """The SAEs of the release for layers above, layer: id."""
        return self.above.ids if self.above else {}


class PairSaes(Part):
    """SAEs of a registry for both models of a pair."""

    base: Registered = Field(description="of the base model")
    chat: Registered = Field(description="of the chat model")
    second: Registered = Field(description="another of the base model, by another seed: the ceiling of any match")


class Diff(Part):
    """The SAE of a pair's differences, where it is not trained as the profile's own is."""

    layer: Layer | None = Field(None, description="where differences are taken; the profile's layer by default")
    harvest: Harvest | None = Field(None, description="what differs from the profile's own, `sae: harvest:`")
    train: Training | None = Field(None, description="what differs from the profile's own, `sae: train:`")
    stream: str | None = Field(None, description="text that is read and trained on in one go, nothing kept on disk")


class Pair(Part):
    """A model before and after preference training."""

    base: str = Field(description="before")
    chat: str = Field(description="after")
    unrelated: str | None = Field(None, description="the base after as much training on something else: a null")
    names: tuple[str, str] = Field(("base", "chat"), description="what the notebooks call the two")
    trained: tuple[str, ...] = Field(
        (), description="the behaviours that the preferences were about, where that is known"
    )
    bank: str | None = Field(
        None, description="a folder of more fine-tunes of the base, one a behaviour: see `scripts/bank.py`"
    )
    sae: PairSaes | None = Field(None, description="SAEs of both, out of sae_lens's registry; else they are trained")
    diff: Diff | None = Field(None, description="the SAE of their differences, where it differs from `sae`")


class RowCosine(Part):
    """Two decoder rows and the cosine published for them."""

    latents: tuple[Layer, Layer]
    value: float


class NegativeShare(Part):
    """A behaviour and its published share of negative projections."""

    behavior: str
    value: float


class ConceptCode(Part):
    """A behaviour, a latent, and the published cosines of the vector's code with it."""

    behavior: str
    latent: Layer
    last: float
    all: float


class Known(Part):
    """Numbers published for the profile's SAE, which a run is compared with."""

    zero_code: dict[int, float] = Field({}, description="latent: code of the zero vector")
    row_cosine: RowCosine | None = Field(None, description="cosine of two decoder rows")
    negative_share: NegativeShare | None = Field(
        None, description="share of active latents more active on the negative side"
    )
    concept_code: ConceptCode | None = Field(None, description="cosine of a vector's code with one latent")


class Profile(Part):
    """A profile."""

    name: str = Field(description="the file's name; not written in it")
    chat: str = Field(
        description="the model that is steered: packaged:NAME, one of the hub, a folder or file; NAME + FOLDER with an adapter"
    )
    base: str | None = Field(None, description="the model before preference training, where there is one")
    layer: Layer = Field(description="where vectors are read and written")
    layers: tuple[Layer, ...] = Field((), description="layers that a sweep looks at")
    answers: Literal["answer", "last", "turn"] = Field(
        "answer",
        description="where answer pairs are read: the mean over the answer, its last token, or the mark that ends its turn",
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps")
    dtype: str = Field("auto", description="auto, bfloat16, float32 or float16")
    behaviors: tuple[str, ...] = Field(min_length=1, description="names or files: see helpers/steering/behaviors.py")
    extra: tuple[str, ...] = Field((), description="more behaviours, for notebooks 03 and 04 alone")
    notebooks: tuple[int, ...] | None = Field(
        None, description="numbers of the notebooks `make report` runs; all by default"
    )
    sae: Sae | None = Field(None, description="the dictionary of the steered model's activations")
    pair: Pair | None = Field(None, description="two models to compare; `base` and `chat` by default")
    known: Known | None = Field(None, description="published numbers")
    seconds: dict[str, float] = Field(
        {}, description="of each notebook from an empty cache: a first estimate of what is left"
    )

    @property
    def has_above(self) -> bool:
        """Whether dictionaries of the layers above are to be had: trained, or named."""
        return bool(self.sae and (self.sae.ids_above if self.sae.release else self.sae.train))

    def above(self, layer: int) -> "Profile":
        """The profile of a layer above: its SAE is what `sae: above:` says, without that one trained as the layer's own is.
        ProfileError where it is out of a registry and has no name."""
        if not self.sae:
            raise ProfileError(
                f"profile {self.name} has no section sae:; copy the one of notebooks/profiles/smollm2.yaml"
            )
        own, how = self.sae, self.sae.above
        if own.release and layer not in own.ids_above:
            raise ProfileError(f"profile {self.name}: sae: above: ids: names no SAE of layer {layer}")
        changed: dict[str, Any] = {"id": own.ids_above.get(layer), "labels": None, "neuronpedia": None}
        if how:
            changed["harvest"] = own.harvest.model_copy(update={"tokens": how.tokens, "held_out": how.held_out})
        if how and how.samples and own.train:
            changed["train"] = own.train.model_copy(update={"samples": how.samples})
        return self.model_copy(update={"layer": layer, "sae": own.model_copy(update=changed)})

    def models(self) -> list[str]:
        """Every model that the profile names, each once."""
        pair = self.pair
        named = [self.chat, self.base, *((pair.base, pair.chat, pair.unrelated) if pair else ())]
        return sorted({name for name in named if name})


def read(file: Path) -> dict[str, Any]:
    """What a file says, as YAML has it; ProfileError if it holds no settings."""
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ProfileError(f"{file.name} is not YAML in UTF-8: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict):
        found = "nothing" if given is None else f"a {type(given).__name__}"
        raise ProfileError(
            f"{file.name} holds {found}; settings such as `chat: packaged:smollm2-135m-instruct` are wanted"
        )
    return given


def _numbers(given: Any) -> Any:
    """Settings with numbers such as 2e-3, which YAML takes for text, as numbers."""
    if isinstance(given, dict):
        return {key: _numbers(value) for key, value in given.items()}
    if isinstance(given, list):
        return [_numbers(value) for value in given]
    if isinstance(given, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", given):
        return int(float(given)) if float(given).is_integer() else float(given)
    return given


def _laid(given: dict[str, Any]) -> dict[str, Any]:
    """Settings with the sections of `pair: diff:`, which say what differs, laid over those of `sae:`."""
    match given:
        case {"sae": dict(sae), "pair": {"diff": dict(diff)} as pair}:
            both = [k for k in ("harvest", "train") if isinstance(sae.get(k), dict) and isinstance(diff.get(k), dict)]
            return {**given, "pair": {**pair, "diff": {**diff, **{k: {**sae[k], **diff[k]} for k in both}}}}
    return given


def of(given: dict[str, Any], file: str) -> Profile:
    """The profile of settings that were read from `file`; ProfileError names every key that is wrong."""
    try:
        return Profile.model_validate(_laid(_numbers(given)))
    except ValidationError as error:
        # What is wrong in `sae:` is so in `pair: diff:` too, which is laid over it: it is said once.
        wrong = {(e["loc"][-2:], repr(e["input"])): _said(e) for e in reversed(error.errors())}
        raise ProfileError(f"{file}: {'; '.join(reversed(wrong.values()))}") from None


def _section(place: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The section that a key stands in."""
    found: type[BaseModel] = Profile
    for key in place:
        if key not in found.model_fields:
            return None
        inner = [found.model_fields[str(key)].annotation, *get_args(found.model_fields[str(key)].annotation)]
        sections = [kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not sections:
            return None
        found = sections[0]
    return found


def _said(error: Any) -> str:
    """One thing that is wrong with a profile, as a person would say it."""
    place, key = error["loc"], str(error["loc"][-1])
    where = "".join(f"{part}: " for part in place[:-1])
    section = _section(place[:-1])
    fields = section.model_fields if section else {}
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, fields, 1, 0.6)
        return f"{where}{key} is not known" + (
            f"; is {near[0]} meant?" if near else f"; it may hold {', '.join(fields)}"
        )
    if error["type"] == "missing":
        return f"{where}{key} is missing ({fields[key].description if key in fields else 'it is needed'})"
    wanted = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{where}{key} = {error['input']!r} given; {wanted} is wanted"


def document() -> str:
    """docs/profiles.md: every section with its keys, from the types."""
    lines = [
        "# Profiles",
        "",
        "Made by `python -m helpers.profiles document`; a test compares. A profile is a YAML file in `notebooks/profiles/`;",
        "`python -m helpers.profiles check FILE` says what is wrong with one. A folder or file is found from the repository's root; `~` and",
        "`$VAR` are expanded.",
        "",
    ]
    titles: dict[type[Part], str] = {Profile: "the file", Sae: "sae:", Harvest: "sae: harvest:", Training: "sae: train:", Above: "sae: above:", Pair: "pair:", PairSaes: "pair: sae:", Registered: "pair: sae: base:, chat:, second:", Diff: "pair: diff:", Known: "known:"}  # fmt: skip
    for section, title in titles.items():
        lines += [f"## {title}", "", (section.__doc__ or "").strip(), "", "| key | needed | what |", "|---|---|---|"]
        for key, field in section.model_fields.items():
            if key != "name":
                default = (
                    "yes"
                    if field.is_required()
                    else "no"
                    if field.default in (None, (), {})
                    else f"no: {field.default}"
                )
                lines.append(f"| `{key}` | {default} | {field.description} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m helpers.profiles", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="say what is wrong with a profile").add_argument("files", nargs="+", type=Path)
    commands.add_parser("document", help="print what a profile may hold, as Markdown")
    options = parser.parse_args()
    if options.command == "document":
        print(document(), end="")
        return 0
    wrong = 0
    for file in options.files:
        try:
            found = of({"name": file.stem, **read(file)}, file.name)
            print(f"{file.name} is a profile: {found.chat}, layer {found.layer}, {len(found.behaviors)} behaviours")
        except (ProfileError, OSError) as error:
            print(error, file=sys.stderr)
            wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
