//! Where models come from: a name and a version become a listing of files, and files become bytes.
//!
//! Knows the REST of MLflow's registry and of the Hugging Face hub, shared folders, and (behind a feature) cloud object
//! stores. Knows no tensors, decides nothing: the coordinator asks it for listings and headers, workers for whole files.
#![forbid(unsafe_code)]
