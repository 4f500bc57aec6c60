"""Train a recipe by several seeds on two cores and write what came of it: python -m tools.measure NAME [SEEDS].

NAME is one of RUNS below. Every run is a process of its own, as a user would start it, from images that are decoded
already. A run that was cut off goes on where it was, and one that is finished is not trained again; so the same command
may be given until all seeds are done. The seconds are those of the whole process; of a run that was cut off, the sum of
its epochs, without the processor's. The runs lie in $RESNET_RUNS (by default runs/), the images in $RESNET_DATA.
Written is nbs/results/imagenette_NAME.json: accuracy after the last epoch, never that of the best one.
"""
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from resnet_nbdev.catalogue import settings_of
from resnet_nbdev.files import read_json, write_json
from resnet_nbdev.recipes import RECIPES
from resnet_nbdev.results import save_result

root = Path(__file__).resolve().parents[1]
RUNS = dict(quick=dict(recipe='quick'), s1_128=dict(recipe='S1', source='imagenette_160', presize=160, resize=128,
                                                    resident=True, precision='auto'))
COPY = ('Imagenette2-160, 9,469 training and 3,925 validation photos, in a copy whose photos are squashed to 160x160 '
        'pixels and saved as JPEG of quality 75')


def flags(changes):
    found = []
    for k, v in changes.items(): found += [f'--{k}'] if v is True else [f'--{k}', str(v)]
    return found


def train(name, seed, store):
    "One run, to its end; its wall and processor seconds, those of earlier parts of it added"
    run, spent = f'{name}-{seed}', store/f'{name}-{seed}.spent.json'
    before = read_json(spent) if spent.exists() else dict(parts=0, load=os.getloadavg()[0])
    if before.get('finished'): return before
    before['parts'] += 1
    write_json(spent, before)
    command = ['resnet_fine_tune', *flags(RUNS[name]), '--data', os.environ['RESNET_DATA'], '--seed', seed,
               '--name', run, '--runs', store, '--resume']
    start, used = perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([Path(sys.executable).parent/command[0], *map(str, command[1:])])
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    if done.returncode: sys.exit(done.returncode)
    found = dict(before, finished=True, seconds=perf_counter() - start, processor=processor)
    if before['parts'] > 1: found |= dict(seconds=read_json(store/run/'metrics.json')['seconds'], processor=None)
    write_json(spent, found)
    return found


def spread(values):
    known = [o for o in values if o is not None] or [float('nan')]
    return dict(mean=sum(known)/len(known), low=min(known), high=max(known), seeds=values)


def write(name, seeds, spent, store):
    rows = [read_json(store/f'{name}-{o}'/'metrics.json')['last'] for o in seeds]
    config = read_json(store/f'{name}-{seeds[0]}'/'config.json')
    values = dict(accuracy=spread([o['accuracy'] for o in rows]), seconds=spread([o['seconds'] for o in spent]),
                  processor_seconds=spread([o['processor'] for o in spent]), recipe=config['arguments'],
                  parameters=config['parameters'])
    loads = ', '.join(f"{o['load']:.1f}" for o in spent)
    save_result(root/'nbs'/'results'/f'imagenette_{name}.json',
                f"Imagenette by the recipe {RUNS[name]['recipe']}: accuracy after the last epoch, and seconds of the "
                'whole command, from decoded images on', values, f'python -m tools.measure {name} {len(seeds)}', 'cpu',
                data=COPY, code=['create_resnet', 'resident_data', 'run_recipe'], seeds=seeds,
                spread='mean, lowest and highest of the seeds',
                note=f'load average of the machine when each run began: {loads}')
    print(json.dumps(values, indent=1))


if __name__ == '__main__':
    name, seeds = sys.argv[1], list(range(1, int((sys.argv + ['3'])[2]) + 1))
    store = Path(os.environ.get('RESNET_RUNS', 'runs'))
    store.mkdir(exist_ok=True)
    assert settings_of(RUNS[name].get('source') or RECIPES[RUNS[name]['recipe']]['source'])
    write(name, seeds, [train(name, o, store) for o in seeds], store)
