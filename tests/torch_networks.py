"""The published networks once more, in PyTorch, to compare ours with.

Written from their description, with the names of guided-diffusion and torchvision, so
that a saved state has the names that trained files have. Imported only by tests that
have PyTorch.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, embedding: int, film: bool, change: str = ""
    ) -> None:
        super().__init__()
        self.film, self.change = film, change
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, inputs),
            nn.SiLU(),
            nn.Conv2d(inputs, outputs, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(embedding, 2 * outputs if film else outputs)
        )
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, outputs),
            nn.SiLU(),
            nn.Dropout(0.0),
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )
        self.skip_connection = (
            nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        )

    def resample(self, x: torch.Tensor) -> torch.Tensor:
        if self.change == "halve":
            return F.avg_pool2d(x, 2)
        if self.change == "double":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return x

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        norm, activation, first = self.in_layers
        h = first(self.resample(activation(norm(x))))
        signal = self.emb_layers(embedding)[:, :, None, None]
        norm, *rest = self.out_layers
        if self.film:
            scale, shift = signal.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + signal)
        for layer in rest:
            h = layer(h)
        return h + self.skip_connection(self.resample(x))


class Attention(nn.Module):
    def __init__(self, channels: int, head_size: int, num_heads: int = 0) -> None:
        super().__init__()
        self.head_size = channels // num_heads if num_heads else head_size
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(2)
        # [N, C, T] -> [N, heads, T, head size]
        query, key, value = (
            part.unflatten(1, (-1, self.head_size)).transpose(2, 3)
            for part in self.qkv(self.norm(flat)).chunk(3, dim=1)
        )
        weights = query @ key.transpose(2, 3) / math.sqrt(self.head_size)
        h = (weights.softmax(dim=-1) @ value).transpose(2, 3).flatten(1, 2)
        return x + self.proj_out(h).view_as(x)


class Stage(nn.Sequential):
    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = layer(x) if isinstance(layer, nn.Conv2d) else layer(x, embedding)
        return x


class UNet(nn.Module):
    def __init__(
        self,
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 2),
        num_blocks: int = 3,
        attention_levels: Sequence[int] = (),
        head_size: int = 64,
        num_heads: int = 0,
        film: bool = True,
        condition: int | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        size = 4 * width

        def mlp(inputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(inputs, size), nn.SiLU(), nn.Linear(size, size)
            )

        self.time_embed = mlp(width)
        if condition is not None:
            self.label_emb = mlp(condition)
            size *= 2
        channels, last = width, len(multipliers) - 1
        skips = [channels]
        self.input_blocks = nn.ModuleList(
            [Stage(nn.Conv2d(1, width, 3, padding=1))],
        )
        for level, multiplier in enumerate(multipliers):
            for _ in range(num_blocks):
                layers: list[nn.Module] = [
                    Block(channels, width * multiplier, size, film)
                ]
                channels = width * multiplier
                if level in attention_levels:
                    layers.append(Attention(channels, head_size, num_heads))
                self.input_blocks.append(Stage(*layers))
                skips.append(channels)
            if level < last:
                self.input_blocks.append(
                    Stage(Block(channels, channels, size, film, "halve"))
                )
                skips.append(channels)
        self.middle_block = Stage(
            Block(channels, channels, size, film),
            Attention(channels, head_size, num_heads),
            Block(channels, channels, size, film),
        )
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for index in range(num_blocks + 1):
                inputs = channels + skips.pop()
                channels = width * multiplier
                layers = [Block(inputs, channels, size, film)]
                if level in attention_levels:
                    layers.append(Attention(channels, head_size, num_heads))
                if level > 0 and index == num_blocks:
                    layers.append(Block(channels, channels, size, film, "double"))
                self.output_blocks.append(Stage(*layers))
        self.out = nn.Sequential(
            nn.GroupNorm(32, channels),
            nn.SiLU(),
            nn.Conv2d(channels, 1, 3, padding=1),
        )

    def forward(
        self,
        x: torch.Tensor,
        steps: torch.Tensor,
        condition: torch.Tensor | None = None,
    ) -> torch.Tensor:
        half = self.width // 2
        frequencies = 10_000.0 ** (-torch.arange(half) / half)
        angles = steps[:, None].float() * frequencies
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        if condition is not None:
            embedding = torch.cat([embedding, self.label_emb(condition)], dim=1)
        skips = []
        for stage in self.input_blocks:
            x = stage(x, embedding)
            skips.append(x)
        x = self.middle_block(x, embedding)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], dim=1), embedding)
        return self.out(x)


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(h))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(
        self,
        features: int,
        channels: int = 1,
        stage_sizes: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inputs = width
        for stage, size in enumerate(stage_sizes):
            inner = width << stage
            layers = []
            for index in range(size):
                stride = 2 if stage > 0 and index == 0 else 1
                layers.append(Bottleneck(inputs, inner, 4 * inner, stride))
                inputs = 4 * inner
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.num_stages = len(stage_sizes)
        self.fc = nn.Linear(inputs, features)

    def forward(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Returns the output of every stage, and the vector."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        stages = []
        for stage in range(self.num_stages):
            x = getattr(self, f"layer{stage + 1}")(x)
            stages.append(x)
        return stages, self.fc(x.mean(dim=(2, 3)))


class StandardisedConv(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = self.weight.flatten(1)
        flat = flat - flat.mean(dim=1, keepdim=True)
        flat = flat / (flat.std(dim=1, keepdim=True) + 1e-5)
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(x, flat.view_as(self.weight), self.bias)


class DaeBlock(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        layers: list[nn.Module] = []
        for size in (inputs, outputs):
            layers += [StandardisedConv(size, outputs, 3), nn.SiLU()]
            layers += [nn.GroupNorm(groups, outputs)]
        super().__init__(*layers)


class DaeUNet(nn.Module):
    """Levels with their group numbers, such as ((64, 8), (128, 16))."""

    def __init__(self, channels: int, levels: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        sizes = [channels, *(size for size, _ in levels)]
        self.down = nn.ModuleList(
            DaeBlock(inputs, outputs, groups)
            for inputs, (outputs, groups) in zip(sizes, levels, strict=False)
        )
        upper = list(reversed(levels[:-1]))
        lower = [size for size, _ in reversed(levels[1:])]
        self.larger = nn.ModuleList(
            nn.ConvTranspose2d(inputs, outputs, 2, 2)
            for inputs, (outputs, _) in zip(lower, upper, strict=True)
        )
        self.up = nn.ModuleList(DaeBlock(2 * s, s, groups) for s, groups in upper)
        self.out = nn.Conv2d(sizes[1], channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for level, block in enumerate(self.down):
            x = block(F.avg_pool2d(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for double, block in zip(self.larger, self.up, strict=True):
            x = block(torch.cat([double(x), skips.pop()], dim=1))
        return self.out(x)
