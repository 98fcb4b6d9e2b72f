"""A prompt for each row: `Session.map` and what it returns.

::

    plan.py      checks everything: rows.py, prompts.py, options.py
    run.py       reads the rows on the caller's thread, and passes them on
    sender.py    sends them on the event-loop thread, as fast as throttle.py allows
                 to the backend, or to worker processes: executors.py, worker_process.py
    outcome.py   how each row ended; progress.py counts that
    mapped.py    the result
"""
