"""The few numbers and marks that every part must agree on."""

IGNORE_INDEX = -100
"""Label of a token that is not supervised (torch's cross-entropy default)."""

TEMPLATE_KEY = "dianjing_template"
"""Where an exported config.json names the chat template."""

IMAGE_MARKER = "<image>"
"""Where a picture stands in the text of a record, as LLaVA's JSON writes it."""
