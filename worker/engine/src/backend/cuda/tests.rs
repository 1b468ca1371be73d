//! The backend on emulated devices: every op against the reference.

use super::*;
use crate::backend::conformance::{self, Promises};
use crate::backend::{FloatDtype, KvDtype};

const EAGER: CudaOptions = CudaOptions {
    graphs: false,
    batch_invariant: false,
};
const INVARIANT: CudaOptions = CudaOptions {
    graphs: false,
    batch_invariant: true,
};

const PROMISES: Promises = Promises {
    weights: &[FloatDtype::Bf16],
    caches: &[KvDtype::Bf16],
    head_widths: &bytes::HEAD_WIDTHS,
    quantised: true,
    rounds: true,
    rows_alone: false,
    slow: true,
};

fn device() -> Arc<CudaDevice> {
    cuda_rig::preload();
    CudaDevice::open(0).expect("an emulated device")
}

#[test]
fn the_default_conforms_to_the_reference() {
    let device = device();
    conformance::check(PROMISES, || {
        CudaBackend::new(Arc::clone(&device), EAGER).expect("a backend")
    });
}

#[test]
fn batch_invariant_rows_stand_alone() {
    let device = device();
    let promises = Promises {
        rows_alone: true,
        ..PROMISES
    };
    conformance::check(promises, || {
        CudaBackend::new(Arc::clone(&device), INVARIANT).expect("a backend")
    });
}
