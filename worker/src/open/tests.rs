//! What is kept, what is tried again, and which device is believed to be lost.

use super::*;

#[test]
fn memory_that_the_plan_granted_may_be_had_another_time() {
    let kind = |error| device_failure(error).kind;
    let bytes = 1 << 30;
    assert_eq!(
        kind(DeviceError::OutOfMemory { bytes }),
        FailureKind::Unavailable
    );
    let failed = DeviceError::Failed("it fell off the bus".into());
    assert_eq!(kind(failed), FailureKind::Unavailable);
    let never = DeviceError::Unsupported("heads of 7".into());
    assert_eq!(kind(never), FailureKind::BadRequest);
}

#[cfg(feature = "cuda")]
mod cuda {
    use common::config::{CacheConfig, CudaSwitches, DeviceEntry, Node};
    use common::ids::{Generation, ReplicaId, WorkerId};
    use common::wire::message::{DeviceKind, GroupMember};
    use engine::backend::cuda::{CudaBackend, CudaDevice, CudaOptions};
    use engine::backend::{Batch, BatchSpan, Heads, KvShape};
    use engine::plan::{Logits, Span, StepPlan};

    use super::*;
    use crate::memory::Memory;
    use crate::text::tests::model_folder;

    fn spec() -> ShardSpec {
        ShardSpec {
            replica: ReplicaId(1),
            generation: Generation(1),
            rank: 0,
            members: vec![GroupMember {
                worker: WorkerId("local/gpu1".into()),
                group_address: "-".into(),
            }],
            group_key: [3; 32],
            source: ModelSource::Folder(model_folder("tiny-llama").to_str().unwrap().to_owned()),
            options: ShardOptions {
                kv_dtype: KvDtype::Bf16,
                quantization: Quantization::None,
                kv_blocks: 9,
                step_tokens_max: 64,
                sequences_max: 8,
                context_max: 512,
                memory_bytes: 512 << 20,
            },
        }
    }

    #[test]
    fn a_device_records_steps_again_after_a_group_did_not_form() {
        cuda_rig::preload();
        let device = CudaDevice::open(0).unwrap();
        let switches = CudaOptions {
            graphs: true,
            batch_invariant: false,
        };
        let backend = CudaBackend::new(device, switches).unwrap();
        let checkpoint = Checkpoint::open(&model_folder("tiny-llama")).unwrap();
        let (spec, memory) = (spec(), Memory::new(1 << 30));
        let options = runner_options(&spec);
        let runner =
            ModelRunner::load(&checkpoint, &options, backend, Solo::new(), &mut |_| {}).unwrap();
        let mut parts = runner.into_parts();
        // What is left of a group that was begun and given up.
        parts.backend().graphs().destroy_all();
        Place::Kept(Box::new(parts)).keep(&memory.lease(&spec));

        let model = memory.lease(&spec).take(0, Duration::ZERO).unwrap();
        let mut parts = model.unwrap().downcast::<Parts<CudaBackend>>().unwrap();
        let graphs = parts.backend().graphs();
        let mut runner = ModelRunner::from_parts(*parts, &options, Solo::new()).unwrap();
        for step in 1..=3 {
            let plan = StepPlan {
                step,
                generation: 1,
                tokens: vec![5],
                spans: vec![Span {
                    position: step as u32 - 1,
                    len: 1,
                    logits: Logits::Last,
                    blocks: vec![1],
                }],
            };
            runner.run(&plan, |_, _| ()).unwrap();
        }
        assert!(graphs.recorded() > 0);
    }

    fn open_on(device: &Arc<Device>) -> Result<Opened, Failure> {
        let (spec, outbox) = (spec(), Arc::<Outbox>::default());
        let cache = CacheConfig {
            folder: "/no/such/cache".into(),
            bytes_max: None,
        };
        open(Opening {
            device: device.clone(),
            library: Arc::new(Library::new(&[], &cache, None, &|_| None)),
            lease: Arc::new(device.memory.lease(&spec)),
            log: ShardLog::new(&spec, outbox.clone()),
            outbox,
            progress: Box::new(|_, _, _| ()),
            on_end: Box::new(drop),
            spec,
        })
    }

    /// Lets a kernel write to a block of a cache that has no such block.
    fn break_device(backend: &mut CudaBackend) {
        let heads = Heads {
            q: 1,
            kv: 1,
            width: 64,
        };
        let shape = KvShape {
            layers: 1,
            blocks: 2,
            heads: heads.kv,
            head_width: heads.width,
            dtype: backend::KvDtype::Bf16,
        };
        let batch = Batch {
            tokens: vec![0],
            positions: vec![0],
            spans: vec![BatchSpan {
                rows: 0..1,
                position: 0,
                blocks: 0..1,
            }],
            blocks: vec![1 << 20],
        };
        let mut kv = backend.alloc_kv(shape).unwrap();
        let mut qkv = backend.alloc(heads.qkv_width()).unwrap();
        backend.begin_step(&batch);
        backend.write_kv(&batch, heads, &mut qkv, None, &mut kv, 0);
        assert!(backend.read(&qkv, &mut [0.0]).is_err(), "it is broken");
    }

    #[test]
    fn a_device_that_fails_while_a_shard_is_opened_is_lost() {
        // A real device may let a kernel read past its buffer.
        if cuda_rig::on_hardware() {
            return;
        }
        cuda_rig::preload();
        let node = Node {
            name: "local".into(),
            address: "127.0.0.1".into(),
            devices: Vec::new(),
        };
        let entry = DeviceEntry {
            worker: WorkerId("local/gpu1".into()),
            kind: DeviceKind::Cuda,
            ordinal: 1,
            memory_bytes: Some(1 << 30),
            threads: None,
            cores: Vec::new(),
            group_port: 0,
            cuda: CudaSwitches::default(),
        };
        let device = Arc::new(Device::open(&node, &entry).unwrap());
        let other = device.memory.lease(&spec());
        other.take(1 << 30, Duration::ZERO).unwrap();
        assert!(open_on(&device).is_err(), "another shard has all memory");
        assert!(!device.lost.is_cancelled(), "the device is well");
        drop(other);

        let Compute::Cuda(gpu) = &device.compute else {
            panic!("a GPU")
        };
        break_device(&mut gpu.backend().unwrap());
        assert!(open_on(&device).is_err());
        assert!(device.lost.is_cancelled());
    }
}
