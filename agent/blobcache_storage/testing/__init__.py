"""The conformance kit: suites a backend or a cache passes, memory twins, a byte oracle, fault tools."""
