"""Resources of `blobcache.dev/v1alpha1`; the CRDs are generated from these models."""
