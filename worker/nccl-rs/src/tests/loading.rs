//! Finding NCCL.

use super::*;

/// What [`Library::load_first`] says of C code in the place of NCCL.
fn load(c: &str, defines: &[&str]) -> (Result<Arc<Library>, LoadError>, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = shared_library(&folder, c, defines);
    let name = path.to_str().unwrap().to_owned();
    (Library::load_first(&["libnccl-absent.so.2", &name]), name)
}

#[test]
fn what_is_nowhere_is_reported_with_every_name_that_was_tried() {
    let error = Library::load_first(&["libnccl-absent.so.2", "libnccl-absent.so"]).unwrap_err();
    let LoadError::NotFound { tried } = &error else {
        panic!("{error}");
    };
    let names: Vec<&str> = tried.iter().map(|attempt| attempt.name.as_str()).collect();
    assert_eq!(names, ["libnccl-absent.so.2", "libnccl-absent.so"]);
    let message = error.to_string();
    assert!(
        message.starts_with("NCCL was not found; tried libnccl-absent.so.2 ("),
        "{message}"
    );
    assert!(message.contains("No such file"), "{message}");
    assert!(message.contains("LD_LIBRARY_PATH"), "{message}");
}

#[test]
fn a_library_without_nccls_functions_is_not_nccl() {
    let (result, _) = load("int something_else(void) { return 0; }", &[]);
    let message = result.unwrap_err().to_string();
    assert!(message.contains("ncclGetVersion"), "{message}");
}

#[test]
fn a_library_that_does_not_tell_its_version_is_not_nccl() {
    let (result, _) = load("int ncclGetVersion(int *v) { return 3; }", &[]);
    let message = result.unwrap_err().to_string();
    assert!(
        message.contains("ncclGetVersion: ncclInternalError"),
        "{message}"
    );
}

#[test]
fn the_loaded_library_tells_its_name_and_version() {
    let (result, name) = load(include_str!("stand_in.c"), &[]);
    let library = result.unwrap();
    assert_eq!(library.name(), name);
    assert_eq!(library.version().to_string(), "2.27.3");
}

#[test]
fn an_old_library_is_refused_with_what_it_lacks_and_the_version_that_has_it() {
    let (result, name) = load(include_str!("stand_in.c"), &["TOO_OLD", "VERSION=21304"]);
    assert_eq!(
        result.unwrap_err().to_string(),
        format!(
            "{name} is NCCL 2.13.4, which is too old: it has no ncclCommInitRankConfig; NCCL 2.14.0 or newer is needed"
        )
    );
}

#[test]
fn an_id_travels_as_bytes_and_does_not_show_its_secret() {
    let id = StandIn::new(&[]).library.unique_id().unwrap();
    assert_eq!(UniqueId::from_bytes(*id.as_bytes()), id);
    assert!(UniqueId::try_from(&id.as_bytes()[..]).is_ok_and(|same| same == id));
    assert!(UniqueId::try_from(&[0u8; 127][..]).is_err());
    assert_eq!(format!("{id:?}"), "UniqueId");
}
