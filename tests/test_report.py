"The report: whole, honest about what is missing, the same numbers as the results, and safe with any text."
import json, shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest, yaml

from cmid import report
from cmid.params import CmidError, load_yaml, write_json, write_whole
from cmid.probe import difference, wilson

ROOT = Path(__file__).parent.parent
VOID = {'meta', 'img', 'br', 'source', 'wbr'}
INITS = ['cmid-resnet18', 'random-resnet18', 'imagenet-resnet18', 'cmid-resnet50']


class Page(HTMLParser):
    "Elements, text, and whether every tag is closed in order."
    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.open, self.crossed = [], '', [], []
        self.feed(html); self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID: self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag: self.crossed.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] != 'style': self.text += data

    def all(self, tag): return [a for t, a in self.elements if t == tag]


@pytest.fixture
def study(tmp_path):
    values = load_yaml(ROOT / 'params.yaml')
    values['profile'] = 'sample'
    values['study'] = dict(backbones=['resnet18', 'resnet50'], methods=['cmid'], baselines=['random-resnet18', 'imagenet-resnet18'], inits=INITS, probes=['scenes'])
    write_whole(tmp_path / 'params.yaml', yaml.safe_dump(values, sort_keys=False))
    report.example_results(tmp_path)
    return tmp_path


@pytest.fixture
def plain(monkeypatch):
    "Figures are made but not rendered, which is most of a report's time."
    monkeypatch.setattr(report, '_png', lambda draw, colour: draw() and 'data:image/png;base64,')


def page(study):
    p = Page(report.html(study))
    assert not p.crossed and not p.open, (p.crossed, p.open)
    return p


def change(path, **more):
    write_json(path, json.loads(path.read_text()) | more)


def test_one_file_that_fetches_nothing(study):
    p = page(study)
    assert 'Missing' not in p.text and 'cannot be' not in p.text
    assert p.all('img') and all(a.get('alt', '').strip() for a in p.all('img'))
    links = [v for _, a in p.elements for k, v in a.items() if k in ('src', 'srcset', 'href', 'action', 'data', 'poster')]
    assert links and all(o.startswith(('data:image/png;base64,', '#')) for o in links)
    assert {o[1:] for o in links if o.startswith('#')} <= {a.get('id') for _, a in p.elements}
    assert not p.all('script') and not p.all('link') and 'url(' not in report.STYLE and '@import' not in report.STYLE
    assert not [k for _, a in p.elements for k in a if k.startswith('on')]
    assert len([t for t, _ in p.elements if t == 'h1']) == 1 and p.all('html')[0]['lang'] and p.all('main')
    assert len(p.all('source')) > 2 and all(a['media'] == '(prefers-color-scheme: dark)' for a in p.all('source'))


def test_numbers_are_those_of_the_results(study, plain):
    shown = [float(a['value']) for a in page(study).all('data')]
    metrics = {i: json.loads((study / 'results/probe/scenes' / i / 'metrics.json').read_text()) for i in INITS}
    due = []
    for kind in ('linear', 'knn'):
        for f in ('0.01', '0.1', '1.0'):
            for i in INITS:
                m = metrics[i][kind][f]; due += [m['accuracy'], m['low'], m['high']]
                for b in INITS[1:3] if i == 'cmid-resnet18' else []:
                    o = metrics[b][kind][f]; due += [m['accuracy'] - o['accuracy'], *difference(m['correct'], 500, o['correct'], 500)]
    assert shown == due


def test_intervals_by_hand(study):
    # 306 of 500: z = 1.96, p = .612: centre (p + z^2/2n) / (1 + z^2/n) = .611146, half width .042566
    row = next(o for o in report.probe_rows(study) if (o['init'], o['probe'], o['fraction']) == ('cmid-resnet18', 'linear', 1.))
    assert row['correct'] == 306 and (row['low'], row['high']) == wilson(306, 500)
    assert abs((row['low'] + row['high']) / 2 - .611146) < 1e-5 and abs((row['high'] - row['low']) / 2 - .042566) < 1e-5
    against = {o['baseline']: o for o in row['against']}
    assert list(against) == ['random-resnet18', 'imagenet-resnet18']
    o = against['random-resnet18']; (l1, u1), (l2, u2) = wilson(306, 500), wilson(205, 500)
    assert abs(o['low'] - (.202 - ((.612 - l1)**2 + (u2 - .41)**2)**.5)) < 1e-12 and abs(o['high'] - (.202 + ((u1 - .612)**2 + (.41 - l2)**2)**.5)) < 1e-12


def test_words_say_no_more_than_the_numbers(study, plain):
    said = {(o['probe'], a['baseline']): report.sentence(o, a) for o in report.probe_rows(study) if o['fraction'] == 1 for a in o['against']}
    assert said['linear', 'random-resnet18'].endswith('is not explained by chance.')
    assert said['linear', 'imagenet-resnet18'].endswith('may be chance: the interval includes 0.') # 3 points on 500 images
    change(study / 'results/probe/scenes/cmid-resnet18/metrics.json', linear={'1.0': report._accuracy(.2, 500, train_images=2000)})
    worse = [o for o in report.headlines(study) if 'linear' in o and 'random' in o]
    assert len(worse) == 1 and '20.0' in worse[0] and '\u221221.0 points' in worse[0] and worse[0].endswith('the baseline is better.')
    text = page(study).text
    assert all(o in text for o in report.headlines(study))


def test_an_architecture_without_baseline_is_compared_with_none(study, plain):
    assert not [o for o in report.probe_rows(study) if o['init'] == 'cmid-resnet50' and o['against']]
    assert 'nothing to compare with' in page(study).text


def test_missing_stages_are_named(study, plain):
    gone = 'probe/scenes/random-resnet18', 'pretrain/cmid-resnet50', 'baselines/imagenet-resnet18', 'prepare/pool', 'reconstruct/cmid-resnet18'
    assert report.summary(study)['missing'] == 0
    for o in gone: shutil.rmtree(study / 'results' / o)
    text = page(study).text
    assert all(f"Missing, its stage has not run: {o.replace('/', ' ')}." in text for o in gone) and text.count('Missing') == 5
    assert report.summary(study)['missing'] == 5
    shutil.rmtree(study / 'results')
    text = page(study).text
    assert 'There is nothing to compare yet.' in text and all(f'{stage} {" ".join(o)}' in text for stage, due in report.cells(study).items() for o in due)
    assert report.summary(study) == dict(missing=sum(len(o) for o in report.cells(study).values()), probe={}, reconstruct={})


def test_parts_of_a_run_may_be_missing(study, plain):
    for o in ('pretrain/cmid-resnet18/curve.json', 'pretrain/cmid-resnet18/epochs.json', 'reconstruct/cmid-resnet18/figure.png', 'probe/scenes/cmid-resnet18/run.json', 'prepare/pool/images.png'): (study / 'results' / o).unlink()
    change(study / 'results/reconstruct/cmid-resnet18/metrics.json', skill=None)
    text = page(study).text
    assert 'Its curves are missing.' in text and 'they are flat' in text and 'unknown' in text


def test_damaged_results_do_not_take_the_rest_along(study, plain):
    (study / 'results/probe/scenes/cmid-resnet18/metrics.json').write_text('{"linear": ')
    text = page(study).text
    assert 'scenes/cmid-resnet18/metrics.json: is no readable JSON' in text and '/' + study.name not in text and 'is not explained' not in text and '1,000 steps' in text
    with pytest.raises(CmidError, match='run its stage again'): report.summary(study)
    write_json(study / 'results/probe/scenes/cmid-resnet18/metrics.json', {'linear': {'1.0': {}}, 'knn': {}, 'chance': .1, 'test_images': 5})
    assert 'has no linear.1.0.accuracy' in page(study).text


def test_other_studies_results_are_not_mixed_in(study, plain):
    shutil.copytree(study / 'results/probe/scenes/cmid-resnet18', study / 'results/probe/scenes/byol-resnet18')
    assert 'byol-resnet18' not in {o['init'] for o in report.probe_rows(study)}
    assert 'no longer has them: results/probe/scenes/byol-resnet18.' in page(study).text


def test_text_from_results_stays_text(study, plain):
    evil = '<script>alert(1)</script><img src=http://x.invalid/a.png onerror="alert(2)">{{ 7 * 7 }}'
    run = study / 'results/probe/scenes/cmid-resnet18/run.json'
    change(run, device=evil, commit=evil, data=evil, versions={evil: evil}, parameters={evil: [evil]})
    change(study / 'results/prepare/pool/metrics.json', findings=[evil], images=evil)
    change(study / 'results/probe/scenes/cmid-resnet18/metrics.json', classes=evil)
    shutil.copytree(run.parent, study / 'results/probe/scenes/<b onclick=x>')
    p = page(study)
    assert not p.all('script') and not p.all('b onclick') and not [a for a in p.all('img') if not a['src'].startswith('data:')]
    assert not [k for _, a in p.elements for k in a if k.startswith('on')] and '49' not in [o for o in p.text.split()]
    assert p.text.count(evil) >= 6 and '<b onclick=x>' in p.text


def test_it_repeats(study): assert report.html(study) == report.html(study)


def test_examples_do_not_replace_results(study):
    with pytest.raises(CmidError, match='results already'): report.example_results(study)
