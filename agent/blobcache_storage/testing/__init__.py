"""The conformance kit: suites that backends and caches pass, memory twins, oracle, fault tools."""
