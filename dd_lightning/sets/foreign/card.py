"""The card of a set that is shared: what it is, in Markdown."""

from dd_lightning.sets.synthetic_file import SyntheticFile


def card(synthetic: SyntheticFile) -> str:
    """Describe a set to those who find it without us."""
    recipe = ", ".join(f"{name} {value}" for name, value in synthetic.evaluation_recipe.items()) or "not recorded"
    return f"""\
# {synthetic.dataset}, distilled to {synthetic.ipc} stored images per class

{synthetic.effective_ipc} training images for each of {synthetic.num_classes} classes, learned with
dd_lightning {synthetic.package_version}.

| | |
| --- | --- |
| dataset | {synthetic.dataset} |
| objective | {synthetic.objective} |
| network | {synthetic.network} |
| distillation steps | {synthetic.step} |
| color space of the network | {synthetic.space.kind} |
| labels | {synthetic.label_kind} |
| learning rate to train with | {synthetic.evaluation_lr:.6g} |
| protocol | {recipe} |

Pictures are clamped to [0, 1] and rounded to 8 bits; the learned images are neither.
"""
