"""Names of torchvision's layout in the published weights of feature networks: Inception (FID), VGG-16 and LPIPS."""

from __future__ import annotations

import re
from collections.abc import Sequence

from jaxgen.weights.mapping import Layout, Table

INCEPTION = Table(
    [
        ('^(params|batch_stats)/', ''),
        (r'[/.](kernel|scale)$', '.weight'),
        (r'/bias$', '.bias'),
        (r'/mean$', '.running_mean'),
        (r'/var$', '.running_var'),
        ('/', '.'),
    ]
)
INCEPTION_SKIP = r'.*\.num_batches_tracked'


def lpips(channels: Sequence[Sequence[int]]) -> Table:
    """VGG-16, whose ReLUs and pools count as layers too, and LPIPS's weight of each channel by depth.

    Args:
      channels: of the convolutions between one halving of the image and the next.
    """
    first = [sum(2 * len(group) + 1 for group in channels[:i]) for i in range(len(channels))]

    def layer(m: re.Match) -> str:
        return f'features.{first[int(m[1])] + 2 * int(m[2])}.'

    names = [
        (r'^vgg/conv(\d+)_(\d+)/', layer),
        (r'^channels/(\d+)$', r'lin\1.weight'),
        ('kernel$', 'weight'),
    ]
    return Table(names, [Layout(r'channels/\d+', '1 c 1 1 -> c')])


# Names in files of torchvision ('features.0.weight') and of lpips ('net.slice1.0.weight', 'lin0.model.1.weight').
LPIPS_RENAMED = (
    (r'^(features|net\.slice\d+)\.(\d+)\.(weight|bias)$', r'features.\2.\3'),
    (r'^lins?\.?(\d+)\.model\.\d+\.weight$', r'lin\1.weight'),
)
