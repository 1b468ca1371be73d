//! The backend on emulated devices: every op against the reference, what is missing, what goes wrong, and recordings.

use super::*;
use crate::backend::conformance::{self, Promises};
use crate::backend::{
    Backend, Batch, BatchSpan, DecodeOps, FloatDtype, Heads, KvDtype, KvShape, LinearShape, Size,
    StepShape,
};
use std::process::Command;

const EAGER: CudaOptions = CudaOptions {
    graphs: false,
    batch_invariant: false,
};
const RECORDED: CudaOptions = CudaOptions {
    graphs: true,
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
    steps: false,
    rounds_inputs: true,
    rounds: true,
    rows_alone: false,
};

fn device() -> Arc<CudaDevice> {
    cuda_rig::preload();
    CudaDevice::open(0).expect("an emulated device")
}

fn backend(options: CudaOptions) -> CudaBackend {
    CudaBackend::new(device(), options).expect("a backend")
}

/// Runs a test of this file in a process of its own, where the environment is as given.
fn in_a_child(test: &str, environment: &[(&str, &str)]) {
    let program = std::env::current_exe().expect("this program");
    let name = format!(
        "{}::{test}",
        module_path!().split_once("::").expect("a crate").1
    );
    let output = Command::new(program)
        .args([&name, "--exact", "--include-ignored", "--nocapture"])
        .envs(environment.iter().copied())
        .output()
        .expect("a child");
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{name} with {environment:?}: {said}"
    );
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

#[test]
fn a_machine_without_a_driver_is_told_how_to_get_one() {
    // Nothing was preloaded here. A machine that has a driver has nothing to tell.
    if let Err(error) = CudaDevice::open(0) {
        assert_eq!(error, CudaError::NoDriver);
        assert!(
            error.to_string().contains("install NVIDIA's driver"),
            "{error}"
        );
        let survey = survey();
        assert_eq!(survey.driver, Err(CudaError::NoDriver));
        assert_eq!(survey.devices, Err(CudaError::NoDriver));
        assert!(survey.peers.is_empty());
    }
}

#[test]
fn a_device_past_the_last_is_refused_with_their_number() {
    cuda_rig::preload();
    let devices = device::count().expect("a driver");
    let error = CudaDevice::open(devices).expect_err("past the last");
    let expected = format!(
        "there is no device cuda:{devices}; the CUDA driver sees {devices}, cuda:0 to cuda:{}",
        devices - 1
    );
    assert_eq!(error.to_string(), expected);
    let last = CudaDevice::open(devices - 1).expect("the last");
    assert_eq!(last.facts().ordinal, devices - 1);
}

#[test]
fn a_survey_tells_devices_and_libraries() {
    cuda_rig::preload();
    let survey = survey();
    assert!(survey.driver.expect("a driver").0 >= 12);
    let devices = survey.devices.expect("devices");
    assert!(devices[0].compute_capability >= (8, 0));
    assert!(devices[0].memory_bytes > 0 && !devices[0].name.is_empty());
    assert_eq!(survey.peers.len(), devices.len());
    if !cuda_rig::on_hardware() {
        assert_ne!(devices[0].pci, devices[1].pci);
        assert_eq!(survey.peers, [[false, true], [true, false]]);
    }
    assert!(survey.cublas.expect("a library")[0] >= 12);
}

#[test]
#[ignore = "run by the test below, in an environment of its own"]
fn no_device_is_seen() {
    // Also started without that environment, with all tests that are ignored.
    if std::env::var_os("CUDA_VISIBLE_DEVICES").is_none() {
        return;
    }
    cuda_rig::preload();
    assert_eq!(CudaDevice::open(0).expect_err("none"), CudaError::NoDevice);
    assert_eq!(survey().devices, Err(CudaError::NoDevice));
}

#[test]
fn a_driver_without_devices_is_told_from_none() {
    in_a_child("no_device_is_seen", &[("CUDA_VISIBLE_DEVICES", "")]);
}

#[test]
fn what_a_device_has_no_room_for_is_refused() {
    let mut backend = backend(EAGER);
    let refused = backend.alloc(1 << 40).err();
    assert_eq!(refused, Some(DeviceError::OutOfMemory { bytes: 4 << 40 }));
    // What was refused did no harm.
    let mut buf = backend.alloc(2).expect("memory");
    backend.write(&[1.0, 2.0], &mut buf);
    let mut out = [0.0; 2];
    backend.read(&buf, &mut out).expect("a working device");
    assert_eq!(out, [1.0, 2.0]);
}

#[test]
fn a_reserved_piece_holds_what_it_was_reserved_for_and_no_more() {
    let step = StepShape {
        rows: 16,
        spans: 4,
        logits_rows: 4,
        width: 64,
        quantised: 0,
        heads: Heads {
            q: 2,
            kv: 2,
            width: 16,
        },
        vocab: 32,
        context_max: 64,
        blocks: 5,
    };
    let mut backend = backend(EAGER);
    let shape = LinearShape {
        n: 32,
        k: 64,
        dtype: FloatDtype::Bf16,
    };
    let kv = KvShape {
        layers: 1,
        blocks: 5,
        heads: 2,
        head_width: 16,
        dtype: KvDtype::Bf16,
    };
    let needed = CudaBackend::scratch_bytes(&step)
        + CudaBackend::linear_bytes(shape)
        + 5 * CudaBackend::kv_block_bytes(kv)
        + 4 * 1024;
    backend.reserve(needed, &step).expect("memory");
    backend
        .pack(shape, &|_, row| row.fill(1.0), None)
        .expect("counted");
    backend.alloc_kv(kv).expect("counted");
    backend.alloc(1024).expect("counted");
    // What is left is the room for rounding.
    assert!(backend.alloc(bytes::ROUNDING as usize / 4).is_err());
}

#[test]
fn formats_that_no_kernel_reads_are_refused() {
    let mut backend = backend(EAGER);
    let shape = LinearShape {
        n: 1,
        k: 1,
        dtype: FloatDtype::F32,
    };
    let error = backend.pack(shape, &|_, _| (), None).expect_err("f32");
    assert_eq!(
        error.to_string(),
        "this device does not serve weights in f32; it keeps bf16, int8 and int4"
    );
    let kv = KvShape {
        layers: 1,
        blocks: 1,
        heads: 1,
        head_width: 20,
        dtype: KvDtype::Bf16,
    };
    let error = backend
        .alloc_kv(kv)
        .expect_err("a width without kernels")
        .to_string();
    assert!(
        error.contains("heads of width 20") && error.contains("112, 128, 256"),
        "{error}"
    );
    let error = backend
        .alloc_kv(KvShape {
            head_width: 16,
            dtype: KvDtype::F32,
            ..kv
        })
        .expect_err("f32")
        .to_string();
    assert!(error.contains("a cache of f32"), "{error}");
}

#[test]
fn a_backend_goes_on_on_another_thread() {
    let device = device();
    let mut backend =
        std::thread::spawn(move || CudaBackend::new(device, EAGER).expect("a backend"))
            .join()
            .expect("no panic");
    let mut buf = backend.alloc(3).expect("memory");
    backend.write(&[1.0, 2.0, 3.0], &mut buf);
    let (mut backend, mut buf) = std::thread::spawn(move || {
        backend.scale(Size { rows: 1, width: 3 }, &mut buf, 2.0);
        (backend, buf)
    })
    .join()
    .expect("no panic");
    // Another device's backend, where there is one, leaves its own context bound to this thread.
    let last = device::count().expect("a driver") - 1;
    let other = CudaDevice::open(last).expect("the last device");
    let mut other = CudaBackend::new(other, EAGER).expect("a backend");
    let theirs = other.alloc(3).expect("memory");
    backend.scale(Size { rows: 1, width: 3 }, &mut buf, 2.0);
    let (mut out, mut their_out) = ([0.0; 3], [9.0; 3]);
    backend.read(&buf, &mut out).expect("a working device");
    other
        .read(&theirs, &mut their_out)
        .expect("a working device");
    assert_eq!((out, their_out), ([4.0, 8.0, 12.0], [0.0; 3]));
}

/// Set for a test that has its process for itself.
const ALONE: &str = "TANDEM_TEST_ALONE";

#[test]
fn the_first_fault_is_given_by_every_later_read() {
    // A real device may let a kernel read past its buffer.
    if !cuda_rig::on_hardware() {
        in_a_child("one_fault_of_a_device", &[(ALONE, "1")]);
    }
}

#[test]
#[ignore = "run by the test above, in a process of its own: the device is lost to it"]
fn one_fault_of_a_device() {
    if std::env::var_os(ALONE).is_none() {
        return;
    }
    let mut backend = backend(EAGER);
    let mut buf = backend.alloc(4).expect("memory");
    // It says that it has more numbers than it has.
    let place = backend.arena.take(16).expect("memory");
    let mut lies = CudaBuf::new(place, 1 << 16, &backend.stream);
    let all = Size {
        rows: 1 << 16,
        width: 1,
    };
    backend.scale(all, &mut lies, 2.0);
    let mut out = [0.0; 4];
    let fault = backend.read(&buf, &mut out).expect_err("a fault");
    assert!(
        matches!(&fault, DeviceError::Failed(reason) if reason.contains("(700)")),
        "{fault}"
    );
    backend.scale(Size { rows: 1, width: 4 }, &mut buf, 1.0);
    assert_eq!(backend.read(&buf, &mut out), Err(fault.clone()));
    assert_eq!(backend.drawn(&mut Vec::new()), Err(fault));
    // The device itself is lost: a new group does not make it well.
    backend.renew();
    assert!(backend.read(&buf, &mut out).is_err());
}

/// `x = 2 * x` as a step of decodes; gives how it came to be computed.
fn double(backend: &mut CudaBackend, rows: usize, x: &mut CudaBuf) -> Vec<DecodeOps> {
    let batch = Batch {
        tokens: vec![0; rows],
        positions: vec![0; rows],
        spans: (0..rows)
            .map(|row| BatchSpan {
                rows: row..row + 1,
                position: 0,
                blocks: 0..0,
            })
            .collect(),
        blocks: Vec::new(),
    };
    backend.begin_step(&batch);
    let mut ops = vec![backend.begin_decode(rows)];
    while ops.last() == Some(&DecodeOps::Wanted) {
        backend.scale(Size { rows, width: 1 }, x, 2.0);
        ops.push(backend.end_decode());
    }
    ops
}

fn first(backend: &mut CudaBackend, buf: &CudaBuf) -> f32 {
    let mut out = [0.0];
    backend.read(buf, &mut out).expect("a working device");
    out[0]
}

#[test]
fn a_step_is_recorded_the_second_time_and_replayed_from_then_on() {
    let mut backend = backend(RECORDED);
    let mut x = backend.alloc(8).expect("memory");
    backend.write(&[1.0; 8], &mut x);
    let (wanted, enqueued) = (DecodeOps::Wanted, DecodeOps::Enqueued);
    for (time, expected) in [
        vec![wanted, enqueued],
        vec![wanted, enqueued],
        vec![enqueued],
        vec![enqueued],
    ]
    .iter()
    .enumerate()
    {
        assert_eq!(&double(&mut backend, 4, &mut x), expected, "time {time}");
        assert_eq!(first(&mut backend, &x), f32::powi(2.0, time as i32 + 1));
    }
    assert_eq!(backend.graphs().recorded(), 1);
    // Another size is another step.
    assert_eq!(double(&mut backend, 8, &mut x), [wanted, enqueued]);
    // A group that ends destroys the recordings, from another thread; a new one records again.
    let graphs = backend.graphs();
    std::thread::spawn(move || graphs.destroy_all())
        .join()
        .expect("no panic");
    for _ in 0..3 {
        assert_eq!(double(&mut backend, 4, &mut x), [wanted, enqueued]);
    }
    assert_eq!(backend.graphs().recorded(), 0);
    backend.renew();
    double(&mut backend, 4, &mut x);
    double(&mut backend, 4, &mut x);
    assert_eq!(
        (backend.graphs().recorded(), double(&mut backend, 4, &mut x)),
        (1, vec![enqueued])
    );
    assert_eq!(first(&mut backend, &x), f32::powi(2.0, 11));
}

#[test]
fn a_step_that_cannot_be_recorded_runs_op_by_op_for_good() {
    let mut backend = backend(RECORDED);
    let mut x = backend.alloc(4).expect("memory");
    backend.write(&[1.0; 4], &mut x);
    double(&mut backend, 4, &mut x);
    assert_eq!(backend.begin_decode(4), DecodeOps::Wanted);
    // What waits for the device cannot be recorded.
    assert!(
        backend.read(&x, &mut [0.0]).is_ok(),
        "a refusal is the recording's, not the device's"
    );
    backend.scale(Size { rows: 4, width: 1 }, &mut x, 2.0);
    assert_eq!(
        backend.end_decode(),
        DecodeOps::Wanted,
        "nothing was computed"
    );
    backend.scale(Size { rows: 4, width: 1 }, &mut x, 2.0);
    assert_eq!(backend.end_decode(), DecodeOps::Enqueued);
    assert_eq!(first(&mut backend, &x), 4.0);
    for _ in 0..3 {
        assert_eq!(
            double(&mut backend, 4, &mut x),
            [DecodeOps::Wanted, DecodeOps::Enqueued]
        );
    }
    assert_eq!(
        (first(&mut backend, &x), backend.graphs().recorded()),
        (32.0, 0)
    );
    // Ranks whose recordings went well fill steps up, and so does this one.
    assert_eq!(backend.padded_rows(17), 24);
}

#[test]
fn a_recording_that_was_given_up_leaves_no_trace() {
    let mut backend = backend(RECORDED);
    let mut x = backend.alloc(4).expect("memory");
    backend.write(&[1.0; 4], &mut x);
    double(&mut backend, 4, &mut x);
    assert_eq!(backend.begin_decode(4), DecodeOps::Wanted);
    backend.scale(Size { rows: 4, width: 1 }, &mut x, 2.0);
    // The step failed elsewhere: it does not end.
    backend.renew();
    assert_eq!(first(&mut backend, &x), 2.0);
    assert_eq!(
        double(&mut backend, 4, &mut x),
        [DecodeOps::Wanted, DecodeOps::Enqueued]
    );
    assert_eq!(first(&mut backend, &x), 4.0);
}

#[test]
fn steps_are_filled_up_only_where_they_are_recorded() {
    assert_eq!(backend(EAGER).padded_rows(17), 17);
    let mut recorded = backend(RECORDED);
    assert_eq!(recorded.padded_rows(17), 24);
    let step = StepShape {
        rows: 512,
        spans: 20,
        logits_rows: 20,
        width: 16,
        quantised: 0,
        heads: Heads {
            q: 1,
            kv: 1,
            width: 16,
        },
        vocab: 4,
        context_max: 16,
        blocks: 2,
    };
    recorded
        .reserve(CudaBackend::scratch_bytes(&step), &step)
        .expect("memory");
    assert_eq!(
        [5, 17, 20].map(|rows| recorded.padded_rows(rows)),
        [8, 20, 20]
    );
}
