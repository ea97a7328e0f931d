//! A store behind TLS: an ordinary daemon, and in front of it what ends TLS.

use std::sync::Arc;

use tokio::net::{TcpListener, UnixStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tonic::Code;

use super::{add, build, digest_of, directory, far, output};
use crate::support::Case;
use crate::support::daemon::Daemon;

/// Ends TLS for whoever connects, with a certificate for `localhost`, and passes on to `socket`. Yields its port, and
/// the certificate.
fn front(runtime: &tokio::runtime::Runtime, socket: std::path::PathBuf) -> (u16, String) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    let config = ServerConfig::builder().with_no_client_auth();
    let mut config = config.with_single_cert(vec![made.cert.der().clone()], key).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let port = listener.local_addr().unwrap().port();
    runtime.spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, socket) = (acceptor.clone(), socket.clone());
            tokio::spawn(async move {
                // Who does not like the certificate goes.
                let Ok(mut outside) = acceptor.accept(stream).await else { return };
                let mut inside = UnixStream::connect(socket).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut outside, &mut inside).await;
            });
        }
    });
    (port, made.cert.pem())
}

pub fn a_store_behind_tls(case: &Case) {
    let far = far(case);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (port, certificate) = front(&runtime, far.socket().to_owned());
    let trusted = case.write("trusted.pem", certificate);
    case.write("tree/file", "over TLS\n");
    let tree = directory("tree", add(case, &far, "tree"), 1);
    let start = |name: &str, url: String, roots: &std::path::Path| {
        let mut command = case.cofferdam(["daemon"]);
        command.env("SSL_CERT_FILE", roots);
        Daemon::start_by(command, case, name, &["--store", &url, "--store-timeout", "2"])
    };
    let secure = format!("grpc+https://localhost:{port}");
    let near = start("near-", secure.clone(), &trusted);
    let made = build(&near, "cp -r /inputs/tree /outputs/x", vec![tree.clone()]).unwrap();
    assert_eq!(digest_of(&output(&made, "x")), digest_of(&tree));

    let (other, _) = front(&runtime, far.socket().to_owned());
    let cases = [
        ("another-", format!("grpc+https://localhost:{other}"), "certificate"),
        ("misnamed-", format!("grpc+https://127.0.0.1:{port}"), "certificate"),
        ("plain-", format!("grpc+http://localhost:{port}"), ""),
    ];
    for (name, url, told) in cases {
        let near = start(name, url.clone(), &trusted);
        let refused = build(&near, "true", vec![tree.clone()]).unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable, "{name}: {refused}");
        assert!(refused.message().contains(&url) && refused.message().contains(told), "{name}: {refused}");
    }
}
