//! gRPC's unary calls over a Unix socket, as containerd serves them: one HTTP/2 connection for each, with deadlines.
//! (<https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>)

use std::{path::Path, time::Duration};

use anyhow::{Context, Result, anyhow, bail};
use protobuf::Message;
use tokio::net::UnixStream;

/// A call that is not answered by then hangs.
const PATIENCE: Duration = Duration::from_secs(240);

/// What a server says of a call that it did not carry out.
#[derive(Debug, thiserror::Error)]
#[error("{method}: {message} (status {code})")]
pub struct Status {
    pub method: String,
    /// gRPC's: 5 NOT_FOUND, 12 UNIMPLEMENTED, ...
    pub code: u32,
    pub message: String,
}

/// Calls `service`'s `method`. An answer that is none is a [`Status`], everything else an error of the way there.
pub fn call<A: Message>(
    socket: &Path,
    service: &str,
    method: &str,
    request: &impl Message,
) -> Result<A> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let body = request.write_to_bytes()?;
    let answer = runtime.block_on(async {
        let call = unary(socket, service, method, &body);
        let answer = tokio::time::timeout(PATIENCE, call).await;
        answer.unwrap_or_else(|_| Err(anyhow!("{method}: no answer within {PATIENCE:?}")))
    })?;
    A::parse_from_bytes(&answer).with_context(|| format!("{method}: understand the answer"))
}

async fn unary(socket: &Path, service: &str, method: &str, body: &[u8]) -> Result<Vec<u8>> {
    let stream = UnixStream::connect(socket)
        .await
        .with_context(|| format!("{}", socket.display()))?;
    let (client, connection) = h2::client::handshake(stream).await?;
    // Ends with the call.
    let driver = tokio::spawn(connection);
    let mut client = client.ready().await?;
    let request = http::Request::post(format!("http://localhost/{service}/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())?;
    let (response, mut sink) = client.send_request(request, false)?;
    let length = u32::try_from(body.len()).context("the request's length")?;
    let frame = [&[0], &length.to_be_bytes()[..], body].concat();
    sink.send_data(frame.into(), true)?;

    let response = response.await?;
    // A call that fails at once has its status among the headers.
    let mut trailers = Some(response.headers().clone());
    let mut source = response.into_body();
    let mut answer = Vec::new();
    while let Some(part) = source.data().await {
        let part = part?;
        source.flow_control().release_capacity(part.len())?;
        answer.extend_from_slice(&part);
    }
    if let Some(last) = source.trailers().await? {
        trailers = Some(last);
    }
    driver.abort();
    let field = |name: &str| {
        let value = trailers.as_ref()?.get(name)?;
        Some(String::from_utf8_lossy(value.as_bytes()).into_owned())
    };
    match field("grpc-status").as_deref() {
        Some("0") => {}
        Some(code) => bail!(Status {
            method: method.into(),
            code: code.parse().unwrap_or(u32::MAX),
            message: decoded(&field("grpc-message").unwrap_or_default()),
        }),
        None => bail!("{method}: the answer has no status"),
    }
    if answer.len() < 5 || answer.first() != Some(&0) {
        bail!("{method}: {} bytes are no message", answer.len());
    }
    Ok(answer.split_off(5))
}

/// gRPC's percent encoding of messages.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let number = after.get(..2).and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 16).ok()
        });
        match (first, number) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    #[test]
    fn messages_are_decoded() {
        assert_eq!(super::decoded("100%25 of%20it%"), "100% of it%");
    }
}
