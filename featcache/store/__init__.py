"""The store: a folder with the features of a dataset, which plain zarr or h5py opens. See docs/store-format.md."""
