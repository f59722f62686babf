"""The tables of the documentation, from benchmarks/results/*.json.

    python benchmarks/tables.py            # writes them into docs/**/*.md
    python benchmarks/tables.py --check    # exit code 1 and the names of the pages that are stale

A page holds a table between two comments,

    <!-- table: trilemma gans_digits -->
    <!-- end of table -->

the first of which names a function of this file and its arguments. A test holds all pages to what this script gives.
The functions are given parsed JSON and return Markdown; the benchmarks print their results by the same ones.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, 'benchmarks', 'results')
TABLE = re.compile(r'(<!-- table: (\w+) ([\w ]+) -->\n).*?(<!-- end of table -->)', re.DOTALL)
# Columns of the trilemma: metric, heading, digits, whether more is better.
COLUMNS = (
    ('frechet', 'Fréchet distance', 2, False),
    ('precision', 'precision', 2, True),
    ('recall', 'recall', 2, True),
    ('coverage', 'coverage', 2, True),
    ('authenticity', 'authenticity', 2, True),
    ('modes', 'modes', 0, True),
)
START_OF_A_CORE = 'seconds_of_a_core_to_first_batch'
FRACTIONS = ('accuracy', 'conditional accuracy', 'zero-shot accuracy', 'recall@1', 'R-precision')  # shown in per cent


def result(name: str) -> dict:
    """benchmarks/results/NAME.json."""
    with open(os.path.join(RESULTS, f'{name}.json'), encoding='utf-8') as file:
        return json.load(file)


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ['---'] * len(heads), *rows]
    return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in lines)


def trilemma(rows: list[dict]) -> str:
    """Quality, diversity and speed: a row for each run."""
    arrows = {True: '↑', False: '↓'}
    heads = ['run', *(f'{title} {arrows[more]}' for _, title, _, more in COLUMNS)]
    table = []
    for r in rows:
        metrics = r['metrics']
        cells = [f'{metrics[m]["value"]:.{d}f}' if m in metrics else '' for m, _, d, _ in COLUMNS]
        if 'images_per_second' in r:
            cells += [f'{r["images_per_second"]:,.0f}', f'{r["parameters"]:,}', f'{r["training_seconds"]:,.0f} s']
        else:
            cells += ['', '', '']
        table.append([r['name'], *cells])
    return markdown([*heads, 'images/s ↑', 'parameters', 'training'], table)


def samplers(rows: list[dict], network: str) -> str:
    """Fréchet distance (recall): a row for each run and sampler, a column for each number of network evaluations."""

    def column(r: dict) -> int:
        return 2 * ((r['evaluations'] + 1) // 2) if r['evaluations'] > 1 else 1

    counts = sorted({column(r) for r in rows})
    table = {(r['run'], r['sampler']): dict.fromkeys(counts, '') for r in rows}
    for r in rows:
        frechet, recall = (r['metrics'][f'{metric}/{network}']['value'] for metric in ('frechet', 'recall'))
        table[r['run'], r['sampler']][column(r)] = f'{frechet:.2f} ({recall:.2f})'
    heads = ['run, sampler', *map(str, counts)]
    return markdown(heads, [[', '.join(key), *cells.values()] for key, cells in table.items()])


def likelihoods(rows: list[dict]) -> str:
    """Bits per dimension with their standard error: a row for each run, the best first."""
    heads = ['run', 'bits/dim ↓', 'estimate', 'parameters', 'training', 'images/s ↑']
    table = [
        [
            r['name'],
            f'{r["value"]:.2f} ± {r["stderr"]:.2f}',
            r['kind'],
            f'{r["parameters"]:,}',
            f'{r["training_seconds"]:,.0f} s',
            f'{r["images_per_second"]:,.0f}',
        ]
        for r in sorted(rows, key=lambda r: r['value'])
    ]
    return markdown(heads, table)


def ratios(records: list[dict]) -> str:
    """Speed beside torch: the median of the turns."""
    heads = ['measured', 'jaxgen / torch', 'command']
    names = {'train': 'training', 'sample': 'sampling'}
    table = [
        [
            f'{names[r["what"]]}, `{r["config"]}`, batch {r["batch"]}',
            f'{r["speed_over_torch"]["median"]:.2f}',
            f'`{shown_command(r["command"])}`',
        ]
        for r in records
    ]
    return markdown(heads, table)


def speeds(records: list[dict]) -> str:
    """Images a second and peak memory."""
    heads = ['measured', 'device', 'images/s', 'memory', 'command']
    what = {'train': 'training', 'data': 'data loader'}
    table = [
        [
            f'{what[r["what"]]}, `{r["config"]}`, batch {r["batch"]}, {r["dtype"]}',
            r['device'],
            f'{r["images_per_second"] if "images_per_second" in r else r["jaxgen"]["images_per_second"]:,.0f}',
            f'{r["peak_bytes"] / 1e9:.1f} GB' if 'peak_bytes' in r else '',
            f'`{shown_command(r["command"])}`',
        ]
        for r in records
    ]
    return markdown(heads, table)


def startup(record: dict) -> str:
    """Seconds from the command to the first update; by the clock only where the machine had no other work."""
    seconds, quiet, rows = record['seconds'], record['load'] <= record['cores'], []
    for name, runs in (
        ('first start', [seconds['cold']]),
        ('second start', seconds['warm']),
        ('going on', seconds['resumed']),
    ):
        least = {key: min(run[key] for run in runs) for key in runs[0]}
        clock = [f'{least[key]:.1f}' if quiet else '-' for key in ('first_line', 'compiling', 'first_update')]
        rows.append([f'{name} of `{record["config"]}`', *clock, f'{least["processor"]:.1f}'])
    return markdown(['seconds', 'to the first line', 'to the compile', 'to the first update', 'of the processor'], rows)


def loader(record: dict) -> str:
    """Images per second out of the data loader: a row for each kind of file and who decodes it, a column for each
    size."""
    rows = record['rows']
    sizes = sorted({r['size'] for r in rows})
    table: dict[str, dict[int, str]] = {}
    for r in rows:
        kept = ', kept in memory' if r['fields']['cache_mb'] else ', kept on disk' if r['fields']['disk_mb'] else ''
        draft = f', `data.draft={r["fields"]["draft"]}`' if 'draft' in r['fields'] else ''
        kind = {'jpeg': 'JPEG', 'png': 'PNG', 'photo': 'JPEG of 512 × 384'}[r['kind']]
        for who, one in (('threads', 'thread'), ('processes', 'process')):
            for n, measured in r[who].items():
                name = f'{kind}{draft}{kept}: {n} {one if n == "1" else who}'
                cell = f'{measured["images_per_second"]:,} ({measured["per_core"]:,})'
                table.setdefault(name, {})[r['size']] = cell
        if 'difference' in r:
            cell = '{rms:.2f}, {largest}'.format(**r['difference'])
            table.setdefault(f'`data.draft={r["fields"]["draft"]}`: difference', {})[r['size']] = cell
    heads = ['images/s (a core)', *(f'{size} × {size}' for size in sizes)]
    return markdown(heads, [[name, *(cells.get(size, '') for size in sizes)] for name, cells in table.items()])


def first_samples(rows: list[dict]) -> str:
    """Seconds to samples: a row for each config, a column for each kind of call, with what it compiled."""
    kinds = {
        'first': 'first',
        'second': 'second',
        'number': 'one image more',
        'option': 'other option',
        'program': 'other program',
        'back': 'back again',
    }

    def cell(call: dict | None) -> str:
        if call is None:
            return ''
        seconds = call['seconds']
        text = f'{seconds:.1f} s' if seconds >= 1 else f'{1000 * seconds:.0f} ms'
        return f'{text}, {call["compiled"]} compiled' if call['compiled'] else text

    table = [[f'`{r["config"]}`, {r["n"]} images', *(cell(r['calls'].get(kind)) for kind in kinds)] for r in rows]
    return markdown(['run', *kinds.values()], table)


def folder(record: dict) -> str:
    """Start, memory and throughput of the loader on a large folder."""
    wall, core = ([f'{s:.1f} s' for s in record[key]] for key in ('seconds_to_first_batch', START_OF_A_CORE))
    memory = {name: f'{value:,.0f} MB' for name, value in record['megabytes'].items()}
    rows = [
        ['first batch, by the clock', ', '.join(wall)],
        ['first batch, time of a core', ', '.join(core)],
        ['memory: all imported', memory['imported']],
        ['memory: at the first batch', memory['started']],
        [f'memory: after {record["batches"]:,} batches of {record["batch"]}', memory['after_batches']],
        ['most memory at any time', memory['most']],
        ['images/s', f'{record["images_per_second"]:,.0f}'],
        ['images/s a core', f'{record["images_per_second_of_a_core"]:,.0f}'],
    ]
    return markdown([f'{record["files"]:,} files', 'measured'], rows)


def weights(record: dict) -> str:
    """Memory of import, load and export of published weights, over the size of their file: a row for each network."""
    rows = []
    for r in record['rows']:
        fields = ', '.join(text.removeprefix('--config.').rpartition('.')[2] for text in r['overrides'])
        cells = [f'`{r["config"]}`' + (f', {fields}' if fields else ''), f'{r["parameters"]:,}', r['dtype']]
        rows.append([*cells, *(f'{r[part]["ratio"]:.2f}' for part in ('import', 'load', 'export'))])
    return markdown(['config', 'parameters', 'dtype', 'import', 'load', 'export'], rows)


def pipelines(record: dict) -> str:
    """Import of whole pipelines, and an evaluation of the network beside torch."""
    heads = ['pipeline', 'parameters', 'files', 'seconds', 'memory', 'evaluation']
    heads += ['jaxgen / torch', 'by the cores', 'memory of each', 'command']
    rows = [
        [
            r['pipeline'],
            f'{sum(r["parameters"].values()):,}',
            f'{r["file"] / 1e9:.1f} GB, {r["dtype"]}',
            f'{r["import"]["seconds"]:.0f}',
            f'{r["import"]["resident"] / 1e9:.1f} GB',
            f'{r["compute"]}, {r["side"]} x {r["side"]}: {r["evaluation"]["jaxgen"]:.0f} s',
            *(f'{r[name]:.2f}' if r[name] else 'not run' for name in ('speed_over_torch', 'speed_over_torch_of_cores')),
            ', '.join(f'{name} {one["resident"] / 1e9:.1f} GB' for name, one in r['turns'].items()),
            f'`{r["command"]}`',
        ]
        for r in record['rows']
    ]
    return markdown(heads, rows)


def convolutions(record: dict) -> str:
    """Rates of convolutions and of their gradients, jaxgen's and torch's."""
    parts = {'forward': 'forward', 'input': "input's gradient", 'kernel': "kernel's gradient"}
    table = []
    for r in record['rates']:
        n, side, channels, features = r['shape']
        rates = [f'{r["jaxgen"][part]:.0f} / {r["torch"][part]:.0f}' for part in parts]
        table.append([f'{n}, {side} × {side}, {channels} to {features}', *rates])
    return markdown(['GFLOP/s of a core, jaxgen / torch', *parts.values()], table)


def growth(record: dict) -> str:
    """What an update costs as one of its sizes doubles, beside FLOPs and bytes."""
    heads = ['network', 'doubled', 'seconds', 'FLOPs', 'bytes', 'beyond both']
    names = {'unet': 'U-Net of DDPM', 'dit': 'DiT', 'transformer': 'transformer over codes'}
    table = [
        [
            names[r['network']],
            f'{r["axis"]}, x {r["factor"]}',
            f'x {r["growth"]:.2f}',
            f'x {r["flops_growth"]:.2f}',
            f'x {r["bytes_growth"]:.2f}',
            f'{100 * r["outside"]:+.0f} %',
        ]
        for r in record['rows']
        if r['axis']
    ]
    return markdown(heads, table)


def slices(record: dict, program: str) -> str:
    """What programs take on slices: a row for each config and slice; program: update or sample."""
    rows = []
    for r in (r for r in record['rows'] if r['program'] == program and 'compiled' in r):
        compiled, memory = r['compiled'], r['compiled']['memory']
        used = 'more than ' if memory['used'] is None else f'{memory["used"] / 2**30:.1f} of '
        cells = [
            f'`{r["config"]}`',
            f'`{r["topology"]}`, fsdp {r["mesh"]["fsdp"]}',
            f'{r["batch"] if program == "update" else r["sample_batch"]}, {r["dtype"]}',
            f'{used}{memory["limit"] / 2**30:.0f} GiB' + ('' if compiled['fits'] else ': does not fit'),
        ]
        if 'seconds' in compiled:
            least, in_turn = (milliseconds(compiled['seconds'][key]) for key in ('least', 'in_turn'))
            sent = dict.fromkeys(('weights', 'activations', 'small'), 0)
            for one in compiled['collectives']:
                sent[one['carrier']] += one['sent']
            cells += [
                f'{compiled["flops"] / 1e12:,.3g}',
                f'{sum(compiled["hbm_bytes"].values()) / 1e9:,.3g}',
                f'{sent["weights"] / 1e9:.3g} / {sent["activations"] / 1e9:.3g}',
                f'{least} to {in_turn}',
                f'{100 * compiled["fraction_of_peak"]:.0f} %',
            ]
        else:
            cells += [f'{compiled["flops"] / 1e12:,.3g}', '', '', '', '']
        rows.append([*cells, '; '.join(compiled['advice'])])
    heads = [
        'config',
        'slice',
        'batch',
        'memory a chip',
        'TFLOP',
        'HBM a chip, GB',
        'sent a chip, GB: weights / activations',
    ]
    return markdown([*heads, 'least time, ms', 'of the peak', 'to change'], rows)


def milliseconds(seconds: float) -> str:
    return f'{1e3 * seconds:,.3g}' if seconds < 1 else f'{1e3 * seconds:,.0f}'


def shown_command(command: str) -> str:
    return command.partition(' --out=')[0]


def shown_metric(metric: dict) -> str:
    """One metric as it stands in a table of systems: 'Fréchet distance 0.74 (n = 500)'."""
    name, value = metric['metric'], metric['value']
    if name in FRACTIONS:
        text = f'{name} {100 * value:.4g} %'
    elif name.startswith('bits'):
        text = f'{value:.4g} {name}'
    else:
        text = f'{name} {value:.4g}' + (f' {metric["unit"]}' if 'unit' in metric else '')
    about = [metric[key] for key in ('note', 'network') if key in metric]
    about += [f'n = {metric["n"]:,}'] if 'n' in metric else []
    return text + (f' ({", ".join(about)})' if about else '')


def systems(record: dict, page: str, folder: str = '../images') -> str:
    """What was trained here: system, samples, metrics, time and commands."""
    rows = []
    for s in record['systems']:
        if s['page'] == page:
            reference = '' if s['reference'] == 'none' else f' ({s["reference"]})'
            images = ' '.join(f'![{alt}]({folder}/{file})' for file, alt in s['images'])
            metrics = ' <br> '.join(map(shown_metric, s['results']))
            time = s['time'] + ('' if s['time'].startswith(('that of', 'not ')) else f', {s["device"]}')
            commands = ' <br> '.join(f'`{c}`' for c in s['commands'])
            rows.append([f'{s["system"]}{reference} <br> `{s["module"]}`', images, metrics, time, commands])
    return markdown(['system', 'samples', 'metrics', 'training', 'commands'], rows)


def modes(record: dict) -> str:
    """Mode coverage: a row for each adversarial loss."""
    rows = [
        [
            s['system'],
            *(f'{r["value"]:g}' for r in s['results']),
            ' <br> '.join(f'`{c}`' for c in s['commands']),
        ]
        for s in record['systems']
        if s['page'] == 'modes'
    ]
    return markdown(['loss', 'modes of 25', 'samples within 3 standard deviations of one', 'commands'], rows)


def published(record: dict) -> str:
    """Published sizes: parameters as counted here, the paper's own number, status."""
    rows = []
    for m in record['models']:
        config = m['config'] + (f':{m["variant"]}' if m['variant'] else '')
        parameters = ' <br> '.join(f'{network} {n:,}' for network, n in m['parameters'].items())
        system = m['system'] + (f' ({m["note"]})' if m['note'] else '')
        paper = f'{m["paper"]} ({m["source"]})' if m['paper'] else m['source']
        rows.append([f'`{config}`', system, parameters, paper, m['status']])
    return markdown(['config', 'system', 'parameters', 'paper', 'status'], rows)


def make(kind: str, names: list[str]) -> str:
    """The table that a page asks for by `<!-- table: KIND NAMES -->`."""
    if kind == 'systems':
        return systems(result('systems'), names[0])
    if kind == 'modes':
        return modes(result('systems'))
    if kind == 'published':
        return published(result('published'))
    if kind == 'slices':
        return slices(result(names[0]), names[1])
    records = [result(name) for name in names]
    if kind == 'samplers':
        return samplers(records[0]['rows'], f'classifier_{names[0].partition("_")[2]}')
    if kind in ('loader', 'folder', 'startup', 'weights', 'pipelines', 'growth', 'convolutions'):
        return globals()[kind](records[0])
    if kind in ('trilemma', 'likelihoods', 'first_samples'):
        return globals()[kind](records[0]['rows'])
    if kind in ('ratios', 'speeds'):
        return globals()[kind](records)
    if kind == 'command':
        return f'```\n{records[0]["command"]}\n```'
    raise ValueError(f'no table {kind!r}')


def filled(text: str) -> str:
    """The text of a page with its tables as the results have them."""
    return TABLE.sub(lambda m: f'{m[1]}{make(m[2], m[3].split())}\n{m[4]}', text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing')
    arguments = parser.parse_args()
    stale = []
    for path in sorted(glob.glob(os.path.join(ROOT, 'docs', '**', '*.md'), recursive=True)):
        with open(path, encoding='utf-8') as file:
            old = file.read()
        if (new := filled(old)) != old:
            stale.append(os.path.relpath(path, ROOT))
            if not arguments.check:
                with open(path, 'w', encoding='utf-8') as file:
                    file.write(new)
    print('\n'.join(stale))
    sys.exit(1 if stale and arguments.check else 0)


if __name__ == '__main__':
    main()
