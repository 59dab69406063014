"""The processes of a launch. Begin at `launch`: how this one was started, and whether as was asked for.

`distributed` joins them, `exchange` is what they tell each other at every step, at a `meeting` they wait for
each other before a collective, `watchdog` notices who is lost and `failure` tells the root cause.
"""
