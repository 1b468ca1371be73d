use super::*;
use crate::backend::reference::ReferenceBackend;
use crate::backend::{KvDtype, WeightDtype};
use crate::collective::solo::Solo;
use std::path::Path;

#[test]
fn the_announced_workspace_is_the_allocated_one() {
    for name in ["tiny-llama", "tiny-mistral", "tiny-mpt"] {
        let checkpoint = Checkpoint::open(
            &Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("../../tests/models")
                .join(name),
        );
        let checkpoint = checkpoint.expect("the tiny model");
        let (weight_dtype, kv_dtype) = (WeightDtype::Bf16, KvDtype::F32);
        let options = RunnerOptions {
            weight_dtype,
            kv_dtype,
            blocks: 2,
            step_tokens_max: 50,
            spans_max: 4,
            generation: 1,
        };
        let footprint =
            Footprint::of::<ReferenceBackend>(&checkpoint.spec, 0, 1, &options).expect("one rank");
        let runner = ModelRunner::load(
            &checkpoint,
            &options,
            ReferenceBackend,
            Solo::new(),
            &mut |_| {},
        )
        .expect("loads");
        let Workspace {
            x,
            y,
            qkv,
            attended,
            mlp_in,
            mlp_mid,
            qk_whole,
            rows,
            logits_part,
            logits,
            position,
        } = runner.parts.work;
        let (position, angles) = match position {
            Position::Rope {
                cos_sin, angles, ..
            } => (cos_sin, angles.capacity()),
            Position::Alibi { slopes } => (slopes, 0),
        };
        let host = runner.logits.len() + angles;
        let bufs = [
            x,
            y,
            qkv,
            attended,
            mlp_in,
            mlp_mid,
            qk_whole,
            rows,
            logits_part,
            logits,
            position,
        ];
        assert_eq!(
            footprint.workspace,
            4 * (host + bufs.iter().map(Vec::len).sum::<usize>()) as u64,
            "{name}"
        );
    }
}
