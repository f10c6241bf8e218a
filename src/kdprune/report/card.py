"""The model card, README.md of a pruned checkpoint, made from `Results` and the licence of the dense model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, model_info

from kdprune.report import summary
from kdprune.report.findings import stand_in
from kdprune.report.page import environment
from kdprune.report.results import Results

PATIENCE = 10.0  # seconds that the hub has to answer; a licence is worth no more
LICENCE = ("license", "license_name", "license_link")  # as the hub spells it in a card's front matter


def declared_licence(model: str) -> dict[str, Any]:
    """What a model's own card, in its directory or on the hub, says of its licence, by ``LICENCE``'s names.

    Empty where there is no card, where it says nothing or cannot be read, and where the hub cannot be asked.
    """
    place = Path(model)
    try:
        if place.is_dir():
            said = ModelCard.load(place / "README.md", ignore_metadata_errors=True).data
        elif summary.is_hub_id(model):
            said = model_info(model, timeout=PATIENCE).card_data or {}
        else:
            return {}
    except Exception:  # the hub client raises many kinds; a result is saved without a licence
        return {}
    return {name: value for name in LICENCE if (value := said.get(name))}


def render_card(results: Results, licence: Mapping[str, Any] | None = None) -> str:
    """Markdown with the front matter the Hugging Face hub reads; ``licence`` as of :func:`declared_licence`."""
    template = environment().get_template("card.md.jinja")
    return template.render(
        results=results,
        front_matter=_front_matter(results, licence or {}),
        title=f"{summary.model_name(results.model)}, pruned",
        headline=summary.headline(results),
        earlier=summary.earlier(results),
        rows=summary.comparison(results),
        stand_ins=[(fit, stand_in(fit)) for fit in results.fit],
        perplexity_setting=summary.perplexity_setting(results),
        speed_setting=summary.speed_setting(results),
        healing=summary.healing(results),
    )


def _front_matter(results: Results, licence: Mapping[str, Any]) -> str:
    """YAML the hub understands; the base model only where it is a hub id, not a path on some machine."""
    fields: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if summary.is_hub_id(results.model) and not Path(results.model).exists():
        fields["base_model"] = results.model
    fields.update(licence)
    fields["tags"] = ["kdprune", "pruned", results.method]
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).rstrip()
