"""Progress bars: the rate and the time left are not of the compile."""

from __future__ import annotations

from jaxgen import log


def test_the_rate_of_a_bar_begins_after_its_first_update(capfd):
    clock = [100.0]
    with log.bar(100) as bar:
        bar._time = lambda: clock[0]
        clock[0] += 60  # the compile
        bar.update(10)
        assert 'image/s' in capfd.readouterr().err
        clock[0] += 4
        bar.update(20)
        clock[0] += 4
        bar.update(20)
        # 40 images in 8 s, so the other 50 take 10 s more; the compile would make it 68.
        assert log.tqdm.format_meter(**bar.format_dict).partition('[')[2].startswith('00:08<00:10,  5.00image/s')


def test_a_bar_that_is_not_drawn(capfd):
    with log.bar(10, quiet=True) as bar:
        bar.update(10)
    assert capfd.readouterr().err == ''


def test_the_bar_of_a_training_begins_after_its_first_call(tmp_path):
    writer = log.Writer(str(tmp_path), 0, 100, 32)
    assert writer.bar is None  # nothing while it compiles
    writer.progress(10, 0.5)
    clock = [writer.bar.start_t + 5]
    writer.bar._time = lambda: clock[0]
    writer.progress(20, 0.5)
    # 10 steps in 5 s, so the other 80 take 40 s.
    assert log.tqdm.format_meter(**writer.bar.format_dict | {'rate': None}).partition('[')[2].startswith('00:05<00:40')
    writer.close()


def test_a_short_bar_ends_full_and_with_its_line(capfd):
    with log.bar(5) as bar:
        bar.update(4)
        bar.update(1)  # sooner than a bar is drawn again
    assert capfd.readouterr().err.rpartition('\r')[2].startswith('100%') and bar.n == 5
    with log.bar(5) as bar:
        bar.update(5)
    log.say('after it')
    assert capfd.readouterr().err.endswith('\njaxgen: after it\n')
