"""The store: features of a dataset on disk, one folder, plain Zarr v3. See docs/store-format.md."""
