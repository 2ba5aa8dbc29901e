"""`make demo`: the whole job on real parts, shown step by step; every step checks what it shows."""
