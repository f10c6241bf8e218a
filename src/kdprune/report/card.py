"""The model card, README.md of a pruned checkpoint, made from `Results` alone."""

from pathlib import Path

import yaml

from kdprune.report import summary
from kdprune.report.findings import stand_in
from kdprune.report.page import environment
from kdprune.report.results import Results


def render_card(results: Results, license: str | None = None) -> str:
    """Markdown with the front matter the Hugging Face hub reads; `license` is the dense model's, if known."""
    template = environment().get_template("card.md.jinja")
    return template.render(
        results=results,
        front_matter=_front_matter(results, license),
        title=f"{summary.model_name(results.model)}, pruned",
        headline=summary.headline(results),
        earlier=summary.earlier(results),
        rows=summary.comparison(results),
        stand_ins=[(fit, stand_in(fit)) for fit in results.fit],
        perplexity_setting=summary.perplexity_setting(results),
        speed_setting=summary.speed_setting(results),
        healing=summary.healing(results),
    )


def _front_matter(results: Results, license: str | None) -> str:
    """YAML the hub understands; the base model only where it is a hub id, not a path on some machine."""
    fields: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if summary.is_hub_id(results.model) and not Path(results.model).exists():
        fields["base_model"] = results.model
    if license:
        fields["license"] = license
    fields["tags"] = ["kdprune", "pruned", results.method]
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).rstrip()
