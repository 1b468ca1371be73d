use super::*;
use safetensors::tensor::TensorView;

fn file(tensors: &[(&str, Dtype, &[usize], Vec<u8>)]) -> Vec<u8> {
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        (
            name.to_string(),
            TensorView::new(*dtype, shape.to_vec(), data).expect("a fitting view"),
        )
    });
    safetensors::serialize(views, None).expect("serialisable")
}

fn one_matrix() -> Vec<u8> {
    let values: Vec<u8> = [1.0f32, -2.5, 3.0, 0.125, 7.0, -8.0]
        .iter()
        .flat_map(|value| half::bf16::from_f32(*value).to_le_bytes())
        .collect();
    file(&[("a.weight", Dtype::BF16, &[3, 2], values)])
}

fn open(files: &[(&str, &[u8])]) -> Result<Weights, String> {
    let dir = tempfile::tempdir().expect("a folder");
    for (name, bytes) in files {
        std::fs::write(dir.path().join(name), bytes).expect("written");
    }
    Weights::open(dir.path()).map_err(|error| {
        error
            .to_string()
            .replace(&dir.path().display().to_string(), "DIR")
    })
}

fn expected(name: &str, shape: &[usize]) -> Expected {
    Expected {
        name: name.to_owned(),
        shape: shape.to_vec(),
    }
}

#[test]
fn numbers_of_each_dtype_are_widened_exactly() {
    let values = [1.0f32, -2.5, 0.125, 1024.0];
    let bytes = |each: &dyn Fn(f32) -> Vec<u8>| {
        values
            .iter()
            .flat_map(|value| each(*value))
            .collect::<Vec<u8>>()
    };
    let file = file(&[
        (
            "bf16",
            Dtype::BF16,
            &[4],
            bytes(&|value| half::bf16::from_f32(value).to_le_bytes().to_vec()),
        ),
        (
            "f16",
            Dtype::F16,
            &[4],
            bytes(&|value| half::f16::from_f32(value).to_le_bytes().to_vec()),
        ),
        (
            "f32",
            Dtype::F32,
            &[4],
            bytes(&|value| value.to_le_bytes().to_vec()),
        ),
    ]);
    let weights = open(&[("model.safetensors", &file)]).expect("opens");
    for name in ["bf16", "f16", "f32"] {
        let tensor = weights.tensor(name).expect("there");
        assert_eq!(tensor.to_vec(), values, "{name}");
        let mut middle = [0.0; 2];
        tensor.read(1, &mut middle);
        assert_eq!(middle, values[1..3], "{name}");
    }
}

#[test]
fn every_cut_of_a_file_is_an_error_that_names_it() {
    let whole = one_matrix();
    for end in 0..whole.len() {
        let error = open(&[("model.safetensors", &whole[..end])]).expect_err("a cut file");
        assert!(error.starts_with("DIR/model.safetensors"), "{error}");
    }
}

#[test]
fn lying_headers_are_errors() {
    let header = |json: &str, data: usize| {
        [
            &(json.len() as u64).to_le_bytes()[..],
            json.as_bytes(),
            &vec![0; data],
        ]
        .concat()
    };
    let lies = [
        header(
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,16]}}"#,
            16,
        ),
        header(
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#,
            16,
        ),
        header(
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
            16,
        ),
        header(
            r#"{"a":{"dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,4]}}"#,
            4,
        ),
        header(
            r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}"#,
            4,
        ),
        header(
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#,
            8,
        ),
        header("{\"a\":", 0),
        header("not json at all", 0),
        u64::MAX.to_le_bytes().to_vec(),
        (1u64 << 40).to_le_bytes().to_vec(),
    ];
    for lie in lies {
        let error = open(&[("model.safetensors", &lie)]).expect_err("a lying header");
        assert!(
            error.starts_with("DIR/model.safetensors is corrupt or cut short: "),
            "{error}"
        );
    }
}

#[test]
fn a_sharded_checkpoint_is_read_through_its_index() {
    let second = file(&[("b.weight", Dtype::F32, &[1], 4.0f32.to_le_bytes().to_vec())]);
    let index = br#"{"metadata":{},"weight_map":{"a.weight":"one.safetensors","b.weight":"two.safetensors"}}"#;
    let weights = open(&[
        ("one.safetensors", &one_matrix()),
        ("two.safetensors", &second),
        (INDEX, index),
    ])
    .expect("opens");
    assert_eq!(weights.tensor("a.weight").expect("there").to_vec()[1], -2.5);
    assert_eq!(weights.tensor("b.weight").expect("there").to_vec(), [4.0]);

    let error = open(&[("one.safetensors", &one_matrix()), (INDEX, index)])
        .expect_err("a shard is missing");
    assert!(error.starts_with("DIR/two.safetensors: "), "{error}");
    let error = open(&[
        ("one.safetensors", &one_matrix()),
        ("two.safetensors", &one_matrix()),
        (INDEX, index),
    ])
    .expect_err("not in its shard");
    assert!(error.contains("places the tensor b.weight here"), "{error}");
}

#[test]
fn an_index_cannot_point_outside_its_folder() {
    for path in [
        "../a.safetensors",
        "/etc/passwd",
        "sub/../../a",
        "..",
        "",
        "sub/a.safetensors",
    ] {
        let index = serde_json::json!({"weight_map": {"a.weight": path}}).to_string();
        let error = open(&[(INDEX, index.as_bytes())]).expect_err(path);
        assert!(
            error.contains("which is not the name of a file in this folder"),
            "{error}"
        );
    }
    for index in ["", "{}", "{\"weight_map\": 3}", "{\"weight_map\": {}}"] {
        assert!(
            open(&[(INDEX, index.as_bytes())])
                .expect_err(index)
                .starts_with("DIR/model.safetensors.index.json: ")
        );
    }
}

#[test]
fn the_check_names_the_tensor_that_does_not_fit() {
    let int8 = file(&[("a.weight", Dtype::I8, &[3, 2], vec![0; 6])]);
    let open = |bytes: &[u8]| open(&[("model.safetensors", bytes)]).expect("opens");
    let message = |bytes: &[u8], needs: &[Expected]| {
        open(bytes).check(needs).expect_err("refused").to_string()
    };
    let fits = [expected("a.weight", &[3, 2])];
    assert!(open(&one_matrix()).check(&fits).is_ok());
    assert_eq!(
        message(&one_matrix(), &[expected("b.weight", &[9])]),
        "the checkpoint has no tensor b.weight [9]"
    );
    assert_eq!(
        message(&one_matrix(), &[expected("a.weight", &[2, 3])]),
        "tensor a.weight has the shape [3, 2]; config.json asks for [2, 3]"
    );
    assert_eq!(
        message(&int8, &fits),
        "tensor a.weight has the dtype I8; supported are BF16, F16 and F32"
    );
    assert_eq!(
        message(&one_matrix(), &[]),
        "the checkpoint has a tensor a.weight that config.json does not account for"
    );
}

#[test]
fn a_folder_without_safetensors_says_what_is_needed() {
    let error = open(&[("pytorch_model.bin", b"x")]).expect_err("no safetensors");
    assert_eq!(
        error,
        "DIR has neither model.safetensors nor model.safetensors.index.json, and no .gguf file; other formats must be converted to safetensors first"
    );
}
