"""
Real parts for tests and the demo: a control plane, origins, and the programs they need.

Belongs here: finding or building programs, starting and stopping them, and talking to them as an
administrator would. Does not belong here: anything that imports the project under test, and
stand-ins that misbehave on purpose.
"""
