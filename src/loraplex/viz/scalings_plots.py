"""Scalings as pictures: over the text, over the LoRA layers, over domains."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from loraplex.errors import ScalingsError
from loraplex.viz.sheet import (
    LABEL_STEP,
    PANEL_TITLE,
    Sheet,
    expert_title,
    label_blocks,
    label_tokens,
    save_figure,
    scale_of,
)
from loraplex.viz.style import MISSING_COLOR, SCALE_COLORS, expert_colors, limited, text_color, tick_label
from loraplex.xlora.scalings.layer_grid import LayerGrid, layer_grid
from loraplex.xlora.scalings.row_scalings import RowScalings, check_same_source, mean_over_tokens

_MAX_TOKENS = 400
_TOKENS_PER_LINE = 80
_TOP = 0.55  # inches for the title, as all sizes here
_MARKERS = "osD^vPX*"


def plot_token_heatmap(row: RowScalings, tokens: Sequence[str], path: str | Path) -> None:
    """Write one panel for each expert: tokens from left to right, blocks from bottom to top, one colour scale.

    A long text goes on below, in lines of at most 80 tokens. Raises ScalingsError if `tokens` are not the
    row's.
    """
    row, tokens, note = limited(row, tokens, _MAX_TOKENS)
    blocks, num_experts = row.by_block(), len(row.experts)
    norm, means = scale_of(blocks.values), row.mean_by_expert().tolist()
    num_lines = -(-row.num_tokens // _TOKENS_PER_LINE)
    per_line = -(-row.num_tokens // num_lines)
    cell = max(0.17, 3 / per_line)
    panel = max(0.3, min(1.35, 0.16 * len(blocks.labels)))
    step = panel + PANEL_TITLE
    line_height = num_experts * step + 0.2 + LABEL_STEP * max(len(tick_label(token)) for token in tokens)
    left = 0.45 + 0.06 * max(map(len, blocks.labels))
    width = cell * per_line
    sheet = Sheet.of_size(max(left + width + 0.95, 5), _TOP + num_lines * line_height)
    sheet.title(f"{row.mixture}: scaling of each token in each block{note}", left=0.15)
    for start in range(0, row.num_tokens, per_line):
        shown = slice(start, min(start + per_line, row.num_tokens))
        top = _TOP + start // per_line * line_height + PANEL_TITLE - 0.05
        for expert in range(num_experts):
            axes = sheet.axes(left, top + expert * step, cell * (shown.stop - start), panel)
            image = blocks.values[shown, :, expert].T.cpu().numpy()  # [blocks, tokens]
            axes.imshow(image, aspect="auto", origin="lower", cmap=SCALE_COLORS, norm=norm, interpolation="nearest")
            expert_title(sheet, axes, row.experts, expert, means[expert])
            label_blocks(axes, blocks.labels, panel)
            label_tokens(axes, tokens[shown], is_last=expert == num_experts - 1)
    height = min(num_experts * step - PANEL_TITLE, 4)
    sheet.bar(left + width + 0.15, _TOP + PANEL_TITLE - 0.05, height, norm, "scaling (mean over the block)")
    save_figure(sheet.figure, path)


def plot_layer_means(rows: RowScalings | Sequence[RowScalings], path: str | Path) -> None:
    """Write the mean over tokens: a panel of block by projection for each expert, and all experts by block.

    Raises ScalingsError for no rows, or rows whose experts or LoRA layers differ.
    """
    rows = [rows] if isinstance(rows, RowScalings) else list(rows)
    experts = check_same_source(rows).experts
    means = mean_over_tokens(rows).cpu()  # [lora_layers, experts]
    grid = layer_grid(rows[0].layers, means)
    num_projections, num_blocks, _ = grid.values.shape
    panel, width = max(0.18 * num_projections, 0.25), num_blocks * max(0.22, min(0.5, 5 / num_blocks))
    step, left = panel + PANEL_TITLE, 1.0
    norm, below = scale_of(grid.values[~grid.values.isnan()]), _TOP + len(experts) * step
    sheet = Sheet.of_size(max(left + width + 0.95, 5), below + 2.15 + 0.07 * max(map(len, grid.blocks)))
    sheet.title(f"{rows[0].mixture}: mean scaling of each LoRA layer over {_counts(rows)}", left=0.15)
    for expert, mean in enumerate(means.mean(dim=0).tolist()):
        axes = sheet.axes(left, _TOP + PANEL_TITLE - 0.05 + expert * step, width, panel)
        axes.set_facecolor(MISSING_COLOR)
        axes.imshow(
            grid.values[..., expert].numpy(), aspect="auto", cmap=SCALE_COLORS, norm=norm, interpolation="nearest"
        )
        expert_title(sheet, axes, experts, expert, mean)
        axes.set_yticks(range(num_projections), grid.projections, fontsize=7, parse_math=False)
        axes.set_xticks(range(num_blocks))
        axes.tick_params(length=2, labelbottom=False)
    sheet.bar(
        left + width + 0.15, _TOP + PANEL_TITLE - 0.05, min(len(experts) * step - PANEL_TITLE, 4), norm, "scaling"
    )
    _draw_block_lines(sheet.axes(left, below + 0.3, width, 1.5), grid, experts)
    save_figure(sheet.figure, path)


def _draw_block_lines(axes: Axes, grid: LayerGrid, experts: Sequence[str]) -> None:
    """Each expert's mean over the LoRA layers of each block, below the panels and in line with them."""
    num_blocks = len(grid.blocks)
    for expert, color in enumerate(expert_colors(len(experts))):
        marker = _MARKERS[expert % len(_MARKERS)]
        axes.plot(
            range(num_blocks), grid.means[:, expert].tolist(), color=color, marker=marker, markersize=3.5, linewidth=1.3
        )
    uniform = 1 / len(experts)
    axes.axhline(uniform, color="0.5", linestyle="--", linewidth=0.8, zorder=0)
    axes.text(num_blocks - 0.4, uniform, f"1/{len(experts)}", fontsize=8, color="0.4", va="center")
    axes.set_xlim(-0.5, num_blocks - 0.5)
    axes.set_ylim(min(0.0, float(grid.means.min())), None)
    axes.set_ylabel("scaling,\nmean over the block", fontsize=8)
    axes.set_xlabel("block", fontsize=9)
    is_named = not all(label.isdecimal() for label in grid.blocks)
    axes.set_xticks(range(num_blocks), grid.blocks, fontsize=7, rotation=90 if is_named else 0, parse_math=False)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(alpha=0.3)


def plot_domain_means(domains: Mapping[str, Sequence[RowScalings]], path: str | Path) -> None:
    """Write a matrix of domain by expert: the mean scaling over all tokens and LoRA layers, as number and colour.

    Raises ScalingsError for no domains, a domain without rows, or rows whose experts or LoRA layers differ.
    """
    empty = [name for name, rows in domains.items() if not rows]
    if empty or not domains:
        raise ScalingsError(f"domains without scalings: {empty or 'all'}. Pass at least one row for each domain.")
    experts = check_same_source([row for rows in domains.values() for row in rows]).experts
    means = torch.stack([mean_over_tokens(rows).mean(dim=0).cpu() for rows in domains.values()])  # [domains, experts]
    norm = scale_of(means)
    labels = [f"{name}\n{_counts(rows)}" for name, rows in domains.items()]
    width, height = 0.95 * len(experts), 0.55 * len(domains)
    left = 0.4 + 0.075 * max(len(part) for label in labels for part in label.split("\n"))
    sheet = Sheet.of_size(max(left + width + 0.95, 5), _TOP + height + 0.5 + 0.04 * max(map(len, experts)))
    sheet.title("mean scaling of each expert by domain", left=0.15)
    axes = sheet.axes(left, _TOP, width, height)
    axes.imshow(means.numpy(), aspect="auto", cmap=SCALE_COLORS, norm=norm)
    axes.set_yticks(range(len(labels)), labels, fontsize=9, parse_math=False)
    axes.set_xticks(range(len(experts)), experts, fontsize=9, parse_math=False)
    for label in axes.get_xticklabels():
        label.set(rotation=30, horizontalalignment="right", rotation_mode="anchor")
    axes.set_xlabel("expert (bold: the strongest in its domain)", fontsize=9)
    axes.tick_params(length=0)
    for domain, expert in np.ndindex(*means.shape):
        is_strongest = bool(means[domain].argmax() == expert)
        _number(axes, domain, expert, float(means[domain, expert]), norm, is_bold=is_strongest)
    sheet.bar(left + width + 0.15, _TOP, height, norm, "scaling")
    save_figure(sheet.figure, path)


def _counts(rows: Sequence[RowScalings]) -> str:
    num_tokens = sum(row.num_tokens for row in rows)
    return f"{len(rows)} text{'s' if len(rows) > 1 else ''}, {num_tokens} token{'s' if num_tokens > 1 else ''}"


def _number(axes: Axes, domain: int, expert: int, value: float, norm: Normalize, *, is_bold: bool) -> None:
    """Write a cell's value in the colour that can be read on it."""
    red, green, blue, _ = ScalarMappable(norm, SCALE_COLORS).to_rgba(np.asarray([value]))[0]
    axes.text(
        expert,
        domain,
        f"{value:.3f}",
        horizontalalignment="center",
        verticalalignment="center",
        color=text_color((red, green, blue)),
        fontweight="bold" if is_bold else "normal",
    )
